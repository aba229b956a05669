#!/usr/bin/env bash
# Fine-tunes an encoder of transformers, whole and with experts, and compares the scores at each k. Rerun to resume.
# bash script/slimmable/finetune.sh MODEL TEXT OUT [flags of finetune.py]; MODEL is a folder of transformers, TEXT plain UTF-8 text to calibrate
# on, OUT a folder named after the model.
# Rows: ROWS (all), TASKS ("sst2") and SEEDS ("1 2"), JOBS (2) at a time; of tasks with folds, fold 0. A row is a conversion and a training:
#   contiguous  neighbouring neurons, chosen by a frozen random router      growing  SMoE-Dropout, k growing from E/2 to E
#   fitted      by co-activation, a quarter shared, with a fitted router    elastic  k drawn at every step from E/4 to E
#   copies      4 copies of the whole network (sparse upcycling)            learned  trained router, its softmax as gate weight, k = E/2
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
if [ $# -lt 3 ] || [ ! -d "$1" ] || [ ! -f "$2" ]; then fail "usage: bash $0 MODEL TEXT OUT [flags of finetune.py]"; fi
model=$1 text=$2 out=$3
shift 3
refuse_flags "task checkpoint seed work_dir run_name method fold data" "ROWS, TASKS and SEEDS select rows" "$@"
with_threads "$@"

# conversion NAME: prints the flags of convert.py
conversion() {
  case $1 in
    contiguous) echo --cut contiguous --router random --correction none ;;
    fitted) echo --shared_experts 4 --correction mean ;;
    contiguous-learned) echo --cut contiguous --gate_weight softmax ;;
    fitted-learned) echo --shared_experts 4 --gate_weight softmax ;;
    copies-learned) echo --expert_init copy --num_experts 4 ;;
    *) fail "ROWS has a row that does not exist: choose among $all" ;;
  esac
}

# training ROW: prints the flags of finetune.py
training() {
  case $1 in
    *-elastic) echo --method elastic --dynamic_moe --moe_top_k_min 4 ;;
    *-growing) echo --method smoe_dropout --dynamic_moe ;;
    copies-learned) echo --method smoe --moe_top_k 2 ;;
    *-learned) echo --method smoe --moe_top_k 8 ;;
  esac
}

converted=""
all="dense fitted-elastic contiguous-elastic contiguous-growing fitted-growing fitted-learned contiguous-learned copies-learned"
for task in ${TASKS:-sst2}; do
  "$PYTHON" -m utils.cli.finetune --task "$task" --checkpoint "$model" --preset laptop "${flags[@]}" >/dev/null
  prepare_task "$task"
  length=()
  if [ "$task" = sst2 ]; then length=(--max_step 1000 --eval_interval 500); fi
  for seed in ${SEEDS:-1 2}; do
    for name in ${ROWS:-$all}; do
      checkpoint=$model
      if [ "$name" != dense ]; then
        folder=${name%-elastic}
        folder=${folder%-growing}
        checkpoint=$out/models/$folder
        words=$(conversion "$folder")
        read -ra how <<<"$words"
        if [[ " $converted " != *" $folder "* ]]; then
          "$PYTHON" convert.py --from "$model" --data "$text" --out "$checkpoint" "${how[@]}"
          converted+=" $folder"
        fi
      fi
      read -ra how <<<"$(training "$name")"
      run=$out/$task/$name-seed$seed
      row "$task-$name-seed$seed" "$run" "$PYTHON" -u finetune.py --task "$task" --checkpoint "$checkpoint" --preset laptop "${length[@]}" \
        "${how[@]}" "${flags[@]}" --seed "$seed" --work_dir "$run"
    done
  done
done
run_rows "$out/logs"
"$PYTHON" -m benchmarks.slimmable_tasks "$out"
exit "$failed"
