#!/usr/bin/env bash
# Table 1: the dense model with dropout, under the official script's name (the same run as dense_dropout.sh).
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method dense_dropout "$@"
