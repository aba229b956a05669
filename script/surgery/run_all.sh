#!/usr/bin/env bash
# Surgery on the runs of a folder: bash script/surgery/run_all.sh runs/laptop/enwik8 [flags of train.py and finetune.py, such as --threads 1]
# METHODS ("merge uncurl slim drop average compress") at KEEP ("8 4") on METHOD-seedSEED of RUNS ("smoe smoe_dropout") and SEEDS ("1"), JOBS
# (2) at a time; compress is done on what merge leaves, the whole model its teacher. Each goes on for STEPS (500) steps on its text, and is
# fine-tuned on TASK (sst2; TASK= for none), UNCURL's decided by the task's rows. Beside them the whole model, trained on for as long and
# fine-tuned, and SCRATCH=1 models of those sizes from random weights. Then the table and the figures. Interrupted, the same command goes on
# where it was.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if has help "$@"; then exec sed -n "2,/^source/{/^#/s/^# //p}" script/surgery/run_all.sh; fi
if [ $# -eq 0 ] || [ "${1#--}" != "$1" ] || [ ! -d "$1" ]; then
  echo "error: usage: bash $0 FOLDER [flags]; FOLDER holds the runs of train.py, such as runs/laptop/enwik8" >&2
  exit 2
fi
trained=${1%/}
shift
for flag in seed work_dir run_name start_from checkpoint task max_step; do
  if has "$flag" "$@"; then
    echo "error: --$flag differs from row to row: leave it out (SEEDS, METHODS, KEEP, TASK and STEPS choose rows)" >&2
    exit 2
  fi
done
jobs=${JOBS:-2} task=${TASK-sst2} steps=${STEPS:-500} rows="" preset=""
for name in ${RUNS:-smoe smoe_dropout}; do
  for seed in ${SEEDS:-1}; do
    run=$trained/$name-seed$seed
    [ -e "$run/result.json" ] || continue
    preset=$(field preset <"$run/config.json")
    rows+="$run whole 0 $seed"$'\n'
    for keep in ${KEEP:-8 4}; do
      for method in ${METHODS:-merge uncurl slim drop average compress} ${SCRATCH:+scratch}; do rows+="$run $method $keep $seed"$'\n'; done
    done
  done
done
if [ -z "$rows" ]; then
  echo "error: $trained holds no finished run named METHOD-seedSEED of ${RUNS:-smoe smoe_dropout}: train some first" >&2
  exit 2
fi
has threads "$@" || set -- "$@" --threads "$(($(nproc) > jobs ? $(nproc) / jobs : 1))"
rows=${rows%$'\n'} runs=runs/$preset/surgery
if [ -n "$task" ] && [ ! -e "data/$task" ]; then "$PYTHON" data/prepare_task.py "$task" >/dev/null; fi
mkdir -p "$runs/logs"
echo "$(wc -l <<<"$rows") rows, $jobs at a time, below $runs; each one's output goes to $runs/logs"
export TASK=$task STEPS=$steps
# shellcheck disable=SC2016
xargs -P "$jobs" -L 1 bash -c '
  runs=$1 at=$(($# - 3)) given=("${@:2:$# - 5}")
  set -- "${@:$at}"
  name=$(basename "$1")-$2-$3
  if bash script/surgery/row.sh "$@" "${given[@]}" >"$runs/logs/$name.log" 2>&1; then
    echo "$name: $(tail -n 1 "$runs/logs/$name.log")"
  else
    echo "$name FAILED: $(tail -n 1 "$runs/logs/$name.log")"
    exit 1
  fi' row "$runs" "$@" <<<"$rows" || { echo "some rows failed; start the same command again when that is mended" >&2; failed=1; }
"$PYTHON" -m utils.reporting.surgery --runs "$runs" --figs "$runs/Figs"
exit "${failed:-0}"
