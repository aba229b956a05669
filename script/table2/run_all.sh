#!/usr/bin/env bash
# Fine-tunes the pre-trained runs of a folder on the tasks of Table 2, then prints the table and draws its figures. Rerun to resume.
# bash script/table2/run_all.sh RUNS [flags of finetune.py]; RUNS, such as runs/laptop/enwik8, holds runs named <method>-seed<seed>.
# Rows: METHODS ("dense smoe thor smoe_dropout") that have a finished run in RUNS, TASKS (all that have a script here), SEEDS ("1 2") and
# FOLDS (all of the task), JOBS (2) at a time; a run is fine-tuned with its own seed. As in the paper, models with experts are fine-tuned
# twice, with all experts and with half of them, unless --moe_top_k or --dynamic_moe is given. SCRATCH=1 adds each row from random weights.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
if [ $# -eq 0 ] || [ "${1#--}" != "$1" ] || [ ! -d "$1" ]; then
  fail "usage: bash $0 RUNS [flags of finetune.py]; RUNS holds runs of train.py, such as runs/laptop/enwik8"
fi
pretrained=${1%/}
shift
refuse_flags "seed work_dir run_name task checkpoint fold data from_scratch" "METHODS, TASKS, SEEDS, FOLDS and SCRATCH select rows" "$@"
with_threads "$@"

tasks=${TASKS:-$(cd script/table2 && printf '%s\n' *.sh | sed 's/\.sh$//' | grep -vx run_all)} settings=""
for task in $tasks; do
  folds=$(folds_of "$task")
  for seed in ${SEEDS:-1 2}; do
    for method in ${METHODS:-dense smoe thor smoe_dropout}; do
      checkpoint=$pretrained/$method-seed$seed
      [ -e "$checkpoint/result.json" ] || continue
      for scratch in "" ${SCRATCH:+--from_scratch}; do for tuned in all half; do
        how=(--seed "$seed" $scratch)
        if [ $tuned = half ]; then
          E=$(field moe_num_expert <<<"$settings")
          if has moe_top_k "${flags[@]}" || [ "$(field moe_top_k <<<"$settings")" != "$E" ]; then continue; fi
          how+=(--moe_top_k "$((E / 2))" --run_name "$method-half")
        fi
        settings=$("$PYTHON" -m utils.cli.finetune --checkpoint "$checkpoint" --task "$task" "${flags[@]}" "${how[@]}")
        folder=$(field work_dir <<<"$settings")
        name=$(field model <<<"$settings")-$task-$(basename "$folder")${scratch:+-scratch}
        command=(bash "script/table2/$task.sh" "$checkpoint" "${flags[@]}" "${how[@]}")
        if [ -z "$folds" ]; then row "$name" "$folder" "${command[@]}"; fi
        for fold in ${folds:+${FOLDS:-$folds}}; do
          row "$name-fold$fold" "${folder/\/fold0//fold$fold}" "${command[@]}" --fold "$fold"
        done
      done; done
    done
  done
done
if [ -z "$rows" ]; then
  fail "$pretrained holds no finished run named <method>-seed<seed> of ${METHODS:-dense smoe thor smoe_dropout}: pre-train one first"
fi
for task in $tasks; do prepare_task "$task"; done
runs=runs/$(field preset <<<"$settings")/table2
run_rows "$runs/logs"
report table2 "$runs"
exit "$failed"
