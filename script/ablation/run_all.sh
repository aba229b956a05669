#!/usr/bin/env bash
# Every row of an ablation that has no result yet: bash script/ablation/run_all.sh NAME [flags of train.py]; NAME is a folder beside this file,
# or depth, which is script/figure5. JOBS (2) at a time, for SEEDS ("1 2"); then its table and figure. Interrupted, the same command goes on
# where it was. Rows that are also in Table 1 are the same runs. Any flag that holds for all rows may follow, such as --preset laptop.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if has help "$@"; then exec sed -n "2,/^source/{/^#/s/^# //p}" script/ablation/run_all.sh; fi
name=${1:-} folder=script/ablation/${1:-}
[ "$name" != depth ] || folder=script/figure5
if [ -z "$name" ] || [ ! -d "$folder" ]; then
  echo "error: usage: bash $0 NAME [flags of train.py]; NAME is one of depth $(cd script/ablation && echo */ | tr -d /)" >&2
  exit 2
fi
shift
run_rows "$folder" "$@"
"$PYTHON" -m utils.reporting.ablations --only "$name" --runs "$runs" --figs "$runs/Figs"
exit "${failed:-0}"
