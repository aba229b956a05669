#!/usr/bin/env bash
# Table 1: AdaMoE: null experts besides the E, so that tokens have different numbers of experts, k = E/2 on average.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name adamoe --run_name adamoe "$@"
