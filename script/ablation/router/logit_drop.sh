#!/usr/bin/env bash
# Ablation of the router, k growing from E/2 to E: random and frozen, half of its logits dropped in training. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --preset paper --method smoe_dropout --gate_name logit_drop --run_name logit_drop "$@"
