#!/usr/bin/env bash
# One row of the surgery table: an operation on a run, STEPS (500) steps of further training, fine-tuning on TASK (sst2; TASK= for none).
# bash script/surgery/row.sh RUN METHOD KEEP SEED [flags of train.py and finetune.py]
# METHOD is one of surgery.py's, and RUN the teacher of the further training, as MC-SMoE recovers (TAUGHT=0: none). compress: merge to KEEP
# experts, then split every map into U V of rank RANK (16) + S, and prune S to KEPT (0.1) of it in training. whole: no operation and no
# teacher (KEEP is 0). scratch: a model with KEEP experts from random weights, trained as long as RUN. Rerun to resume.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
if [ $# -lt 4 ]; then fail "usage: bash $0 RUN METHOD KEEP SEED [flags]; RUN is the folder of a finished run of train.py"; fi
run=$1 method=$2 keep=$3 seed=$4 steps=${STEPS:-500} task=${TASK-sst2}
shift 4
preset=$(field preset "$run/config.json")
check_surgery_flags "$run" "$task" "$@"
name=$(basename "$run")-$method-$keep runs=runs/$preset/surgery threads=0
previous=""
for word in "$@"; do
  if [ "$previous" = --threads ]; then threads=$word; fi
  previous=$word
done

# operate OUT ARGS...: surgery.py
operate() { "$PYTHON" -u surgery.py --threads "$threads" --out "$@"; }

start=$run checkpoint=$run teacher=()
if [ "$method" != whole ] && [ "${TAUGHT:-1}" != 0 ]; then teacher=(--teacher "$run"); fi
case $method in
  whole) ;;
  scratch) checkpoint=$runs/scratch/$name ;;
  compress)
    start=$runs/$name checkpoint=$runs/text/$name/compressed
    operate "$start-merged" --from "$run" --method merge --keep "$keep"
    operate "$start" --from "$start-merged" --method compress --rank "${RANK:-16}" --kept "${KEPT:-0.1}"
    ;;
  *)
    start=$runs/$name checkpoint=$runs/$name
    operate "$start" --from "$run" --method "$method" --keep "$keep"
    ;;
esac
if [ "$method" = scratch ]; then
  bash script/surgery/scratch.sh "$run" "$keep" --work_dir "$checkpoint" "$@"
else
  "$PYTHON" -u train.py --start_from "$start" ${teacher[@]+"${teacher[@]}"} --max_step "$steps" --eval_interval "$steps" --seed "$seed" \
    --work_dir "$runs/text/$name" "$@"
fi
if [ -z "$task" ]; then exit; fi
if [ "$method" = uncurl ]; then  # as published: the task's rows decide which experts are merged
  checkpoint=$runs/$name-$task
  operate "$checkpoint" --from "$run" --method uncurl --keep "$keep" --task "$task"
fi
"$PYTHON" -u finetune.py --task "$task" --checkpoint "$checkpoint" --seed "$seed" --work_dir "$runs/$task/$name" "$@"
