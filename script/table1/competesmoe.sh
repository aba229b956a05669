#!/usr/bin/env bash
# Table 1: CompeteSMoE, runs all experts in training and distils the winners into the router (Pham et al. 2024).
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method competesmoe "$@"
