#!/usr/bin/env bash
# Figure 5, depth: the dense model with 12 layers, of equal parameters. Any flag of train.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
pretrain --preset paper --method dense --n_layer 12 --run_name dense-12layers "$@"
