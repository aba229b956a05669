#!/usr/bin/env bash
# Table 1: CompeteSMoE's successor, which runs all experts at planned steps (Nguyen et al. 2025).
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method competesmoe2 "$@"
