#!/usr/bin/env bash
# Table 1: HyperRouter: router weights made by a frozen random network of a trained vector, k growing from E/2 to E.
# Flags of train.py may follow, such as --model bert, --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method smoe_dropout --gate_name hyper_router --no_freeze_gate --run_name hyper_router "$@"
