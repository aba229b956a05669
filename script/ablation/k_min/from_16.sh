#!/usr/bin/env bash
# Ablation of the smallest k: 16 of 16, so k is E throughout, which is a row of the schedule's. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
exec bash script/ablation/schedule/constant_all.sh "$@"
