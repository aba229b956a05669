#!/usr/bin/env bash
# Table 1: similarity-aware SMoE, routes averaged over similar tokens (Nguyen et al. 2025).
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method similarity "$@"
