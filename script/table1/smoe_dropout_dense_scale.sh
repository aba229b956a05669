#!/usr/bin/env bash
# Table 1, Transformer-XL on enwik8: SMoE-Dropout with the layer's output times E. Any flag of train.py may follow, such as --preset laptop or --seed 2.
# Paper scale: 400,000 steps on a GPU. Not a row of the paper.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe_dropout --output_scale dense --run_name smoe_dropout_dense_scale "$@"
