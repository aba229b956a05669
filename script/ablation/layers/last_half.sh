#!/usr/bin/env bash
# Ablation of which of four layers have experts, the others dense with equal parameters: 2, 3 (counted from 0). Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --moe_index 2,3 --dense_width all --run_name last_half "$@"
