#!/usr/bin/env bash
# Table 1: AdamSMoE, MomentumSMoE with an Adam step in the first layer; constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method momentumsmoe --method_options adam=true --run_name adamsmoe "$@"
