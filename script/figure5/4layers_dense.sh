#!/usr/bin/env bash
# Figure 5, depth: the dense model with 4 layers, the row of Table 1. Any flag of train.py may follow.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
exec bash script/table1/dense.sh "$@"
