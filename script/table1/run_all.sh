#!/usr/bin/env bash
# Every row of Table 1 that has no result yet, JOBS (2) at a time, for SEEDS ("1 2"); then the table and the figures. Interrupted, the same
# command goes on where it was. Any flag of train.py that holds for all rows may follow, such as --preset laptop --data D --dataset NAME;
# --model bert or roberta runs the rows in that folder.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if has help "$@"; then exec sed -n "2,/^source/{/^#/s/^# //p}" script/table1/run_all.sh; fi
model=$("$PYTHON" -m utils.cli.train --preset paper "$@" | field model)
folder=script/table1
[ "$model" = transformer_xl ] || folder=script/table1/$model
run_rows "$folder" "$@"
"$PYTHON" -m utils.reporting.tables --runs "$runs" --figs "$runs/Figs"
exit "${failed:-0}"
