#!/usr/bin/env bash
# Table 1: sigmoid gates as in sigma-MoE, experts chosen in training by Sinkhorn normalisation, as in S-BASE; constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name sigma_moe --method_options selection=sinkhorn --run_name s_base "$@"
