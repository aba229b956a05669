#!/usr/bin/env bash
# WikiText-103: elastic k, learned router, times E, k drawn at every step from E/2 to E.
# Flags of train.py may follow, such as --preset wikitext103_medium, --preset words or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset wikitext103_small --method elastic --output_scale dense --gate_name learned --no_freeze_gate "$@"
