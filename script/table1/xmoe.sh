#!/usr/bin/env bash
# Table 1: X-MoE's router: cosines in a space of few dimensions; constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name xmoe --run_name xmoe "$@"
