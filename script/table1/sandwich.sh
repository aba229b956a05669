#!/usr/bin/env bash
# Table 1: the router of SMoE-Dropout, the sandwich rule over k: several k per step, small ones distilled from E.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method sandwich "$@"
