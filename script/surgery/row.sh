#!/usr/bin/env bash
# One row of run_all.sh: an operation on a run, then STEPS (500) steps of training on its text, and fine-tuning on TASK (sst2; TASK= for none).
# bash script/surgery/row.sh RUN METHOD KEEP SEED [flags of train.py and finetune.py]; METHOD whole: no operation; scratch: random weights.
# What is complete says so and is passed over.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if [ $# -lt 4 ]; then
  echo "error: usage: bash $0 RUN METHOD KEEP SEED [flags]; RUN is the folder of a finished run of train.py" >&2
  exit 2
fi
run=$1 method=$2 keep=$3 seed=$4 steps=${STEPS:-500} task=${TASK-sst2}
shift 4
name=$(basename "$run")-$method-$keep runs=runs/$(field preset <"$run/config.json")/surgery threads=0
if [ "$method" = scratch ]; then exec bash script/surgery/scratch.sh "$run" "$keep" --work_dir "$runs/scratch/$name" "$@"; fi
previous=""
for word in "$@"; do
  if [ "$previous" = --threads ]; then threads=$word; fi
  previous=$word
done

# operate OUT ARGS...
operate() { "$PYTHON" -u surgery.py --from "$run" --method "$method" --keep "$keep" --threads "$threads" --out "$@"; }

start=$run tuned=$run
if [ "$method" != whole ]; then
  start=$runs/$name tuned=$runs/$name
  operate "$start"
fi
"$PYTHON" -u train.py --start_from "$start" --max_step "$steps" --eval_interval "$steps" --seed "$seed" --work_dir "$runs/text/$name" "$@"
if [ -z "$task" ]; then exit; fi
if [ "$method" = uncurl ]; then
  tuned=$runs/$name-$task
  operate "$tuned" --task "$task"
fi
"$PYTHON" -u finetune.py --task "$task" --checkpoint "$tuned" --seed "$seed" --work_dir "$runs/$task/$name" "$@"
