#!/usr/bin/env bash
# Table 1: StableMoE: routing by token id, which another router teaches for the first tenth of training; constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name stable_moe --run_name stable_moe "$@"
