#!/usr/bin/env bash
# Table 1: expert choice: in training experts take tokens, k = E/2 of them per token on average; in evaluation tokens take experts.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name expert_choice --run_name expert_choice "$@"
