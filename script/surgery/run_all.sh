#!/usr/bin/env bash
# Surgery on the pre-trained runs of a folder, then the table and its figures. Rerun to resume.
# bash script/surgery/run_all.sh FOLDER [flags of train.py and finetune.py]; FOLDER holds runs of train.py, such as runs/laptop/enwik8.
# Rows: METHODS ("merge uncurl keep_best drop average reap hc_smoe compress") at KEEP ("8 4") experts on the runs METHOD-seedSEED of RUNS
# ("smoe smoe_dropout") and SEEDS ("1"), JOBS (2) at a time. Each is trained for STEPS (500) further steps and fine-tuned on TASK (sst2;
# TASK= for none), see row.sh, with the whole model as teacher (TAUGHT=0: without). Baselines: the whole model, trained and fine-tuned as
# long, and with SCRATCH=1 models of those sizes from random weights.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
if [ $# -eq 0 ] || [ "${1#--}" != "$1" ] || [ ! -d "$1" ]; then
  fail "usage: bash $0 FOLDER [flags of train.py and finetune.py]; FOLDER holds runs of train.py, such as runs/laptop/enwik8"
fi
pretrained=${1%/}
shift
refuse_flags "seed work_dir run_name start_from checkpoint task max_step" "RUNS, SEEDS, METHODS, KEEP, TASK and STEPS select rows" "$@"
with_threads "$@"

export TASK=${TASK-sst2} STEPS=${STEPS:-500}
runs=""
for model in ${RUNS:-smoe smoe_dropout}; do
  for seed in ${SEEDS:-1}; do
    run=$pretrained/$model-seed$seed
    [ -e "$run/result.json" ] || continue
    preset=$(field preset "$run/config.json")
    runs=runs/$preset/surgery
    if [ -z "$rows" ]; then check_surgery_flags "$run" "$TASK" "${flags[@]}"; fi
    for keep in 0 ${KEEP:-8 4}; do
      methods=whole
      if [ "$keep" != 0 ]; then methods="${METHODS:-merge uncurl keep_best drop average reap hc_smoe compress} ${SCRATCH:+scratch}"; fi
      for method in $methods; do
        case $method in whole | scratch | merge | uncurl | keep_best | drop | average | reap | hc_smoe | compress) ;; *) fail "METHODS: there is no $method" ;; esac
        name=$model-seed$seed-$method-$keep place=${TASK:-text}
        if [ "$method$TASK" = scratch ]; then place=scratch; fi  # row.sh trains it there, and TASK is empty
        row "$name" "$runs/$place/$name" bash script/surgery/row.sh "$run" "$method" "$keep" "$seed" "${flags[@]}"
      done
    done
  done
done
if [ -z "$rows" ]; then
  fail "$pretrained holds no finished run named METHOD-seedSEED of ${RUNS:-smoe smoe_dropout}: train one first"
fi
if [ -n "$TASK" ]; then prepare_task "$TASK"; fi
run_rows "$runs/logs"
report surgery "$runs"
exit "$failed"
