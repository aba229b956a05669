#!/usr/bin/env bash
# Trains one row of an ablation: bash script/ablation/run.sh NAME ROW [flags of train.py], such as --preset laptop or --seed 2.
# NAME and ROW are those of script/ablation/rows.json, which holds the flags of every row; without ROW its rows are listed.
# A row that is also a row of Table 1 is the same run.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  fail "usage: bash $0 NAME ROW [flags of train.py]; NAME and ROW are those of script/ablation/rows.json"
fi
if [ $# -eq 1 ]; then exec "$PYTHON" -m utils.reporting.ablations "$1"; fi
words=$("$PYTHON" -m utils.reporting.ablations "$1" "$2")
given=()
while IFS= read -r word; do given+=("$word"); done <<<"$words"
pretrain --preset paper "${given[@]}" "${@:3}"
