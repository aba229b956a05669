#!/usr/bin/env bash
# Table 1: the router of SMoE-Dropout, k drawn anew at every step.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method elastic "$@"
