#!/usr/bin/env bash
# A small vision transformer with experts, put in by plug-in: every method at every k, on clean and on corrupted images. Rerun to resume.
# bash script/vision/digits.sh [OUT] [flags of benchmarks/vision.py]; OUT is a folder, runs/vision/digits by default.
# The images are scikit-learn's digits (pip install scikit-learn), or with --images DIR those of a folder with a folder for each class.
# Rows: ROWS (all) and SEEDS ("1 2"), JOBS (2) at a time. OUT/page.md is the page of the runs.
# `python -m benchmarks.vision_page OUT --collect` copies their records into results/vision, and renders the page there.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
out=runs/vision/digits
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
  out=$1
  shift
fi
refuse_flags "method router output_scale options lr seed out" "ROWS and SEEDS select rows" "$@"
with_threads "$@"

# row_flags ROW: prints the flags of benchmarks/vision.py
row_flags() {
  case $1 in
    dense | dense_dropout | smoe | smoe_dropout | elastic | momentumsmoe | similarity | attention | competesmoe) echo --method "$1" ;;
    dense_low_rate | dense_dropout_low_rate) echo --method "${1%_low_rate}" --lr 3e-4 ;;
    hyper_router) echo --method smoe_dropout --router hyper_router ;;
    elastic_learned_dense_scale) echo --method elastic --router learned --output_scale dense ;;
    smoe_dense_scale | smoe_dropout_dense_scale | elastic_dense_scale) echo --method "${1%_dense_scale}" --output_scale dense ;;
    *) fail "ROWS has $1, which does not exist: choose among $all" ;;
  esac
}

all="dense dense_low_rate dense_dropout dense_dropout_low_rate smoe smoe_dropout elastic momentumsmoe similarity attention competesmoe"
all+=" hyper_router smoe_dense_scale smoe_dropout_dense_scale elastic_dense_scale elastic_learned_dense_scale"
"$PYTHON" -m benchmarks.vision --method dense "${flags[@]}" --out "$out/check" --dry_run
for seed in ${SEEDS:-1 2}; do
  for name in ${ROWS:-$all}; do
    words=$(row_flags "$name")
    read -ra how <<<"$words"
    run=$out/$name-seed$seed
    row "$name-seed$seed" "$run" "$PYTHON" -u -m benchmarks.vision "${flags[@]}" "${how[@]}" --seed "$seed" --out "$run"
  done
done
run_rows "$out/logs"
"$PYTHON" -m benchmarks.vision_page "$out"
exit "$failed"
