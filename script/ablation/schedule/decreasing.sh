#!/usr/bin/env bash
# Ablation of the schedule: k falls linearly from E to E/2. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --dynamic_moe_mode linear_decrease --run_name decreasing "$@"
