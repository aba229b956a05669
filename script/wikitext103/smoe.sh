#!/usr/bin/env bash
# WikiText-103: SMoE, learned router with the Switch load-balance loss, k = 2 of 16 experts, as in the follow-ups.
# Flags of train.py may follow, such as --preset wikitext103_medium, --preset words or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset wikitext103_small --method smoe --moe_top_k 2 "$@"
