#!/usr/bin/env bash
# Table 1: SMoE with the router z-loss of ST-MoE beside its load-balance loss, constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name z_loss --run_name z_loss "$@"
