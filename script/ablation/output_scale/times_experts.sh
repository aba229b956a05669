#!/usr/bin/env bash
# Ablation of the output scale: times E, the row of Table 1. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
exec bash script/table1/smoe_dropout_dense_scale.sh "$@"
