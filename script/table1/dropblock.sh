#!/usr/bin/env bash
# Table 1: the dense model with blocks of hidden units dropped (DropBlock, Ghiasi et al. 2018).
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method dropblock "$@"
