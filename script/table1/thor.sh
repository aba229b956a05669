#!/usr/bin/env bash
# Table 1: THOR, random experts with a consistency loss between two passes (Zuo et al. 2021).
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method thor "$@"
