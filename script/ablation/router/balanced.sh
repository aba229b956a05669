#!/usr/bin/env bash
# Ablation of the router, k growing from E/2 to E: learned, with the Switch load-balance loss. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --gate_name learned --no-freeze_gate --run_name balanced "$@"
