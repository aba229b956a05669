#!/usr/bin/env bash
# Table 1: SMoE with the layer's output times E, the scale of the dense layer.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --output_scale dense --run_name smoe_dense_scale "$@"
