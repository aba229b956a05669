#!/usr/bin/env bash
# The baseline of surgery: a model trained like RUN, but with KEEP experts of the same width in every layer from the first step on.
# bash script/surgery/scratch.sh RUN KEEP [flags of train.py], such as --work_dir DIR
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if [ $# -lt 2 ] || [ ! -e "$1/config.json" ]; then
  echo "error: usage: bash $0 RUN KEEP [flags of train.py]; RUN is the folder of a finished run of train.py" >&2
  exit 2
fi
run=$1 keep=$2
shift 2
has work_dir "$@" || set -- --work_dir "runs/$(field preset <"$run/config.json")/surgery/scratch/$(basename "$run")-$keep" "$@"
start train.py --settings_from "$run" --moe_num_expert "$keep" "$@"
