#!/usr/bin/env bash
# WikiText-103: similarity-aware SMoE, k = 2 of 16 experts.
# Flags of train.py may follow, such as --preset wikitext103_medium, --preset words or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset wikitext103_small --method similarity --moe_top_k 2 "$@"
