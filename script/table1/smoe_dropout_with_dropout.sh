#!/usr/bin/env bash
# Table 1: SMoE-Dropout with dropout of 0.1, as the official script trains it.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe_dropout --dropout 0.1 --run_name smoe_dropout_with_dropout "$@"
