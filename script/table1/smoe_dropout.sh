#!/usr/bin/env bash
# Table 1, Transformer-XL on enwik8: SMoE-Dropout. Any flag of train.py may follow, such as --preset laptop or --seed 2.
# Paper scale: 400,000 steps on a GPU. Published test bpc: 1.1776 at k = 8, 1.1486 at k = 16.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe_dropout "$@"
