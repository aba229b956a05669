#!/usr/bin/env bash
# WikiText-103: SMoE-Dropout with the router of HyperRouter.
# Flags of train.py may follow, such as --preset wikitext103_medium, --preset words or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset wikitext103_small --method smoe_dropout --gate_name hyper_router --no_freeze_gate --run_name hyper_router "$@"
