#!/usr/bin/env bash
# Table 1: Matryoshka MoE, learned router, k drawn for every layer by itself in every pass.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method matryoshka "$@"
