#!/usr/bin/env bash
# Table 1, Transformer-XL on enwik8: the dense model with DropBlock on hidden units (Ghiasi et al. 2018). Any flag of train.py may follow, such as --preset laptop or --seed 2.
# Paper scale: 400,000 steps on a GPU. Published test bpc: not known.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method dropblock "$@"
