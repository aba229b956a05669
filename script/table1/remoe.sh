#!/usr/bin/env bash
# Table 1: ReMoE's router: ReLU gates, led to k = E/2 on average.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name remoe --run_name remoe "$@"
