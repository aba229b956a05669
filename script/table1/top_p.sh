#!/usr/bin/env bash
# Table 1: top-p routing, as many experts as it takes to be confident, at most k = E.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name top_p --moe_top_k 16 --run_name top_p "$@"
