#!/usr/bin/env bash
# Ablation of which of four layers have experts, the others dense with equal parameters: 0, 1 (counted from 0). Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --moe_index 0,1 --dense_width all --run_name first_half "$@"
