#!/usr/bin/env bash
# One row of run_all.sh: an operation on a run, then STEPS (500) steps of training on its text, and fine-tuning on TASK (sst2; TASK= for none).
# bash script/surgery/row.sh RUN METHOD KEEP SEED [flags of train.py and finetune.py]; METHOD whole: no operation; scratch: trained whole at
# that size, then fine-tuned.
# METHOD compress: merged to KEEP, then every map U V of rank RANK (16) + S, taught by RUN while S is pruned to KEPT (0.1) of its hidden units.
# What is complete says so and is passed over.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if [ $# -lt 4 ]; then
  echo "error: usage: bash $0 RUN METHOD KEEP SEED [flags]; RUN is the folder of a finished run of train.py" >&2
  exit 2
fi
run=$1 method=$2 keep=$3 seed=$4 steps=${STEPS:-500} task=${TASK-sst2}
shift 4
name=$(basename "$run")-$method-$keep runs=runs/$(field preset <"$run/config.json")/surgery threads=0
previous=""
for word in "$@"; do
  if [ "$previous" = --threads ]; then threads=$word; fi
  previous=$word
done

# operate OUT ARGS...
operate() { "$PYTHON" -u surgery.py --threads "$threads" --out "$@"; }

start=$run tuned=$run teacher=()
if [ "$method" = compress ]; then
  start=$runs/$name tuned=$runs/text/$name/compressed teacher=(--teacher "$run")
  operate "$start-merged" --from "$run" --method merge --keep "$keep"
  operate "$start" --from "$start-merged" --method compress --rank "${RANK:-16}" --kept "${KEPT:-0.1}"
elif [ "$method" != whole ] && [ "$method" != scratch ]; then
  start=$runs/$name tuned=$runs/$name
  operate "$start" --from "$run" --method "$method" --keep "$keep"
fi
if [ "$method" = scratch ]; then
  tuned=$runs/scratch/$name
  bash script/surgery/scratch.sh "$run" "$keep" --work_dir "$tuned" "$@"
else
  "$PYTHON" -u train.py --start_from "$start" ${teacher[@]+"${teacher[@]}"} --max_step "$steps" --eval_interval "$steps" --seed "$seed" \
    --work_dir "$runs/text/$name" "$@"
fi
if [ -z "$task" ]; then exit; fi
if [ "$method" = uncurl ]; then
  tuned=$runs/$name-$task
  operate "$tuned" --from "$run" --method uncurl --keep "$keep" --task "$task"
fi
"$PYTHON" -u finetune.py --task "$task" --checkpoint "$tuned" --seed "$seed" --work_dir "$runs/$task/$name" "$@"
