#!/usr/bin/env bash
# Table 1, Transformer-XL on enwik8: the dense model with a learned dropout rate (Gal et al. 2017). Any flag of train.py may follow, such as --preset laptop or --seed 2.
# Paper scale: 400,000 steps on a GPU. Published test bpc: not known.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method concrete_dropout "$@"
