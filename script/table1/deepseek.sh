#!/usr/bin/env bash
# Table 1: DeepSeek-V3's router: sigmoid scores, one shared expert, load balanced by a correction bias; constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name deepseek --run_name deepseek "$@"
