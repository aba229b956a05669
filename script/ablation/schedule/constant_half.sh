#!/usr/bin/env bash
# Ablation of the schedule: k is E/2 throughout. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --dynamic_moe_mode constant --moe_top_k_min 8 --moe_top_k_max 8 --run_name constant_half "$@"
