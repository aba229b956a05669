#!/usr/bin/env bash
# Ablation of the schedule: k is 1, 2, 4, 8, 16 for a fifth of training each, but never below E/2. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --dynamic_moe_mode multi_step_increase --run_name multi_step "$@"
