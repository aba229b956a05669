#!/usr/bin/env bash
# Table 1: MomentumSMoE, heavy-ball momentum across depth (Teo and Nguyen 2024); constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method momentumsmoe "$@"
