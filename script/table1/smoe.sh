#!/usr/bin/env bash
# Table 1: SMoE, learned router with the Switch load-balance loss, constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe "$@"
