#!/usr/bin/env bash
# Table 1, Transformer-XL on enwik8: CompeteSMoE (Pham et al. 2024). Any flag of train.py may follow, such as --preset laptop or --seed 2.
# Paper scale: 400,000 steps on a GPU. Not a row of the paper.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method competesmoe "$@"
