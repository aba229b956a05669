#!/usr/bin/env bash
# Figure 5: SMoE-Dropout with 8 layers, all with experts. Flags of train.py may follow.
# The official script had experts in layers 0 to 3 only: --moe_index 0,1,2,3 --run_name smoe_dropout-8layers-first4
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe_dropout --n_layer 8 --run_name smoe_dropout-8layers "$@"
