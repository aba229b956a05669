#!/usr/bin/env bash
# Table 1: sigma-MoE's router: sigmoid gates, expert dropout, entropy loss; constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name sigma_moe --run_name sigma_moe "$@"
