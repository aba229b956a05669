#!/usr/bin/env bash
# Table 2 from the checkpoints of a folder of pre-training runs: bash script/table2/run_all.sh runs/laptop/enwik8 [flags of finetune.py]
# Every row that has a pre-trained run there, of TASKS ("sst2 csqa asdiv_a mawps svamp"), SEEDS ("1 2") and FOLDS ("0 1 2 3 4"), JOBS (2) at
# a time; then the table and the figures. The run <method>-seed<seed> is fine-tuned with the same seed. SCRATCH=1 runs each row from random
# weights, too. Interrupted, the same command goes on where it was.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if has help "$@"; then exec sed -n "2,/^source/{/^#/s/^# //p}" script/table2/run_all.sh; fi
if [ $# -eq 0 ] || [ "${1#--}" != "$1" ] || [ ! -d "$1" ]; then
  echo "error: usage: bash $0 RUNS [flags of finetune.py]; RUNS holds the runs of train.py, such as runs/laptop/enwik8" >&2
  exit 2
fi
pretrained=${1%/}
shift
for flag in seed work_dir run_name task checkpoint fold data from_scratch; do
  if has "$flag" "$@"; then
    echo "error: --$flag differs from row to row: leave it out (TASKS, SEEDS, FOLDS and SCRATCH choose rows)" >&2
    exit 2
  fi
done
jobs=${JOBS:-2}
has threads "$@" || set -- "$@" --threads "$(($(nproc) > jobs ? $(nproc) / jobs : 1))"

rows="" model="" settings="" tasks=${TASKS:-sst2 csqa asdiv_a mawps svamp}
for task in $tasks; do
  case $task in asdiv_a | mawps) folds=${FOLDS:-0 1 2 3 4} ;; *) folds=- ;; esac
  for seed in ${SEEDS:-1 2}; do
    for method in dense_model smoe thor smoe_dropout; do
      checkpoint=$pretrained/${method%_model}-seed$seed
      [ -e "$checkpoint/result.json" ] || continue
      settings=$("$PYTHON" -m utils.cli.finetune --checkpoint "$checkpoint" --task "$task" "$@")
      model=$(field model <<<"$settings")
      for fold in $folds; do
        for start in pretrained ${SCRATCH:+scratch}; do rows+="$model $task $method $checkpoint $seed $fold $start"$'\n'; done
      done
    done
  done
done
if [ -z "$rows" ]; then
  echo "error: $pretrained holds no finished run named <method>-seed<seed> of dense, smoe, thor or smoe_dropout: pre-train some first" >&2
  exit 2
fi
rows=${rows%$'\n'}
for task in $tasks; do [ -e "data/$task" ] || "$PYTHON" data/prepare_task.py "$task" >/dev/null; done
runs=runs/$(field preset <<<"$settings")/table2
mkdir -p "$runs/logs"
echo "$(wc -l <<<"$rows") runs, $jobs at a time, below $runs; each one's output goes to $runs/logs"
# shellcheck disable=SC2016
xargs -P "$jobs" -L 1 bash -c '
  runs=$1 at=$(($# - 6)) given=("${@:2:$# - 8}")
  set -- "${@:$at}"
  model=$1 task=$2 method=$3 checkpoint=$4 seed=$5 fold=$6 start=$7
  name=$model-$task-$method-seed$seed
  folder=script/table2/$task
  [ "$model" = transformer_xl ] || folder=script/table2/$model/$task
  if [ "$fold" != - ]; then given+=(--fold "$fold") name+=-fold$fold; fi
  if [ "$start" = scratch ]; then given+=(--from_scratch) name+=-scratch; fi
  if bash "$folder/$method.sh" "$checkpoint" "${given[@]}" --seed "$seed" >"$runs/logs/$name.log" 2>&1; then
    echo "$name: $(tail -n 1 "$runs/logs/$name.log")"
  else
    echo "$name FAILED: $(tail -n 1 "$runs/logs/$name.log")"
    exit 1
  fi' row "$runs" "$@" <<<"$rows" || { echo "some runs failed; start the same command again when that is mended" >&2; failed=1; }
"$PYTHON" -m utils.reporting.tables --table table2 --runs "$runs" --figs "$runs/Figs"
exit "${failed:-0}"
