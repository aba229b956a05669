#!/usr/bin/env bash
# Ablation of the schedule: k grows exponentially from E/2 to E. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --dynamic_moe_mode exp_increase --run_name exponential "$@"
