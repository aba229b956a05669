#!/usr/bin/env bash
# From nothing to a table and figures on a laptop: installs, prepares text, trains dense, smoe and smoe_dropout at the quick preset,
# tests them at every k. Interrupted, it goes on where it was. Flags are passed to every training run, such as --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
bash script/setup.sh
PYTHON=.venv/bin/python

data=$("$PYTHON" data/prepare.py enwik8 --fallback pystdlib)
dataset=$(basename "$data")
for method in dense smoe smoe_dropout; do
  folder=runs/quick/$dataset/$method-seed1
  echo "== $method -> $folder"
  "$PYTHON" -u train.py --preset quick --method "$method" --data "$data" --dataset "$dataset" --seed 1 --work_dir "$folder" "$@"
done
echo
"$PYTHON" -m utils.reporting.tables --runs runs/quick/"$dataset" --figs Figs
echo
echo "At this size nothing overfits, and the dense model is expected ahead; results/NOTES.md says what longer runs showed, --output_scale dense among it."
