#!/usr/bin/env bash
# Table 1: MoE++, constant, copy and zero experts besides the E of the learned router, constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method moe_plus_plus "$@"
