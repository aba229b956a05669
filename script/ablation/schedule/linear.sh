#!/usr/bin/env bash
# Ablation of the schedule: k grows linearly from E/2 to E: the row of Table 1. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
exec bash script/table1/smoe_dropout.sh "$@"
