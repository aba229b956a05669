#!/usr/bin/env bash
# WikiText-103: SMoE-Dropout, frozen random router, k growing from E/2 to E.
# Flags of train.py may follow, such as --preset wikitext103_medium, --preset words or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset wikitext103_small --method smoe_dropout "$@"
