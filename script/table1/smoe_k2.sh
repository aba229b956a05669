#!/usr/bin/env bash
# Table 1: SMoE with a learned router and k = 2, the official script's default.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --moe_top_k 2 --run_name smoe_k2 "$@"
