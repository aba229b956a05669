#!/usr/bin/env bash
# Table 1: Self-Routing: coordinates of the hidden state are the router's logits, constant k = E/2.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe --gate_name self_routing --run_name self_routing "$@"
