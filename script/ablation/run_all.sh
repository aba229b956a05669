#!/usr/bin/env bash
# Trains every row of an ablation that has no result yet, JOBS (2) at a time, for SEEDS ("1 2"), then prints its table and draws its figure:
# bash script/ablation/run_all.sh NAME [flags of train.py that hold for all rows, such as --preset laptop]
# NAME is one of script/ablation/rows.json: depth, schedule, router, experts, k_min, scale or layers; length, dropout, place, learning_rate,
# growing and specialists are studies at preset replica and take no other. ROWS selects rows by name.
# Rerun to resume. A row that is also a row of Table 1 is the same run.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  fail "usage: bash $0 NAME [flags of train.py]; NAME is one of script/ablation/rows.json"
fi
name=$1
shift
names=$("$PYTHON" -m utils.reporting.ablations "$name")
prepare_rows --preset "$("$PYTHON" -m utils.reporting.ablations "$name" --preset)" "$@"
for seed in ${SEEDS:-1 2}; do
  for one in ${ROWS:-$names}; do
    words=$("$PYTHON" -m utils.reporting.ablations "$name" "$one")
    run=$(sed -n '/^--run_name$/{n;p;}' <<<"$words")-seed$seed
    row "$run" "$runs/$run" bash script/ablation/run.sh "$name" "$one" "${flags[@]}" --seed "$seed"
  done
done
run_rows "$runs/logs"
"$PYTHON" -m utils.reporting ablation --only "$name" --runs "$runs" --figs "$runs/Figs"
exit "$failed"
