#!/usr/bin/env bash
# Figure 5, depth, as the official script had it: SMoE-Dropout with 8 layers, of which only 0 to 3 have experts and the others are dense,
# as wide as one expert. Any flag of train.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe_dropout --n_layer 8 --moe_index 0,1,2,3 --run_name smoe_dropout-8layers-first4 "$@"
