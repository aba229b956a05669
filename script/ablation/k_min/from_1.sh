#!/usr/bin/env bash
# Ablation of the smallest k, growing linearly to E = 16: from 1. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --moe_top_k_min 1 --run_name from_1 "$@"
