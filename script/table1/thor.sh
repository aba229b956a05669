#!/usr/bin/env bash
# Table 1, Transformer-XL on enwik8: THOR, one random expert a layer and pass, two passes (Zuo et al. 2021). Any flag of train.py may follow, such as --preset laptop or --seed 2.
# Paper scale: 400,000 steps on a GPU. Published test bpc: not known.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method thor "$@"
