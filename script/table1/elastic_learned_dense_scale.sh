#!/usr/bin/env bash
# Table 1: elastic k with a learned router and the layer's output times E, the scale of the dense layer.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method elastic --gate_name learned --no_freeze_gate --output_scale dense --run_name elastic_learned_dense_scale "$@"
