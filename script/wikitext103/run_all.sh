#!/usr/bin/env bash
# Trains every row of WikiText-103 that has no result yet, JOBS (2) at a time, for SEEDS ("1 2"), then prints the table and draws its figures.
# Rerun to resume. Flags of train.py that hold for all rows may follow, such as --preset wikitext103_medium, --preset words or --data DIR.
# ROWS selects rows by the names of the scripts in this folder; default all of them.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
train_rows wikitext103 "dense dense_dropout smoe smoe_dropout elastic momentumsmoe similarity hyper_router" --preset wikitext103_small "$@"
