#!/usr/bin/env bash
# Ablation of the number of experts at equal parameters, k growing from E/2 to E: 64 experts. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --moe_num_expert 64 --run_name 64_experts "$@"
