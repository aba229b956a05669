#!/usr/bin/env bash
# Trains the rows of Table 1 on text8 that have no result yet, JOBS (2) at a time, for SEEDS ("1 2"), then prints the table and draws its
# figures. Rerun to resume. Flags of train.py that hold for all rows may follow, such as --preset laptop.
# ROWS selects rows by the names of the scripts in script/table1.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
train_rows table1 "dense dense_dropout smoe smoe_dropout elastic momentumsmoe similarity hyper_router" --dataset text8 "$@"
