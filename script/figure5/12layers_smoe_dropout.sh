#!/usr/bin/env bash
# Figure 5, depth: SMoE-Dropout with 12 layers, all of them with experts. The official script turned only layers 0 to 3 into experts and left
# the others dense and 512 wide: add --moe_index 0,1,2,3 for that. Any flag of train.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe_dropout --n_layer 12 --run_name smoe_dropout-12layers "$@"
