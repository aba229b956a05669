#!/usr/bin/env bash
# Ablation of the schedule: k is drawn from E/2..E at every step: the row of Table 1. Any flag of train.py may follow, such as --preset laptop or --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
exec bash script/table1/elastic.sh "$@"
