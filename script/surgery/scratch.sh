#!/usr/bin/env bash
# The baseline of surgery: a model like a run's with KEEP experts of the same width in every layer, trained from random weights.
# bash script/surgery/scratch.sh RUN KEEP [flags of train.py], such as --work_dir DIR
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
if [ $# -lt 2 ] || [ ! -e "$1/config.json" ]; then
  fail "usage: bash $0 RUN KEEP [flags of train.py]; RUN is the folder of a finished run of train.py"
fi
run=$1 keep=$2
shift 2
preset=$(field preset "$run/config.json")
has work_dir "$@" || set -- --work_dir "runs/$preset/surgery/scratch/$(basename "$run")-$keep" "$@"
start train.py --settings_from "$run" --moe_num_expert "$keep" "$@"
