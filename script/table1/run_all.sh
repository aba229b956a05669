#!/usr/bin/env bash
# Every row of Table 1 that has no result yet, JOBS (2) at a time, for SEEDS ("1 2"); then the table and the figures. Interrupted, the same
# command goes on where it was. Any flag of train.py that holds for all rows may follow, such as --preset laptop --data D --dataset NAME;
# --model bert or roberta runs the rows in that folder.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if has help "$@"; then exec sed -n "2,/^source/{/^#/s/^# //p}" script/table1/run_all.sh; fi
for flag in seed work_dir run_name method; do
  if has "$flag" "$@"; then
    echo "error: --$flag differs from row to row: leave it out (SEEDS=\"1 2\" chooses seeds)" >&2
    exit 2
  fi
done
jobs=${JOBS:-2} seeds=${SEEDS:-1 2}
settings=$("$PYTHON" -m utils.command_line --preset paper "$@")
prepare_text --preset paper "$@"
data=$(field data <<<"$settings") runs=$(dirname "$(field work_dir <<<"$settings")") model=$(field model <<<"$settings")
folder=script/table1
[ "$model" = transformer_xl ] || folder=script/table1/$model
if [ ! -e "$data/meta.json" ]; then
  echo "error: $data is no prepared text: make one with data/prepare.py, for bert and roberta with data/prepare_pieces.py" >&2
  exit 2
fi
has threads "$@" || set -- "$@" --threads "$(($(nproc) > jobs ? $(nproc) / jobs : 1))"
mkdir -p "$runs"

rows=$(for seed in $seeds; do
  for script in "$folder"/*.sh; do
    case $script in */run_all.sh | */directly_dense_training.sh) ;; *) echo "$script $seed" ;; esac  # the second is dense_dropout.sh
  done
done)
total=$(wc -l <<<"$rows")
echo "$total runs, $jobs at a time, into $runs; each one's output goes to $runs/<row>-seed<seed>.log"
# shellcheck disable=SC2016
xargs -P "$jobs" -L 1 bash -c '
  runs=$1 script=$(($# - 1)) seed=$#
  script=${!script} seed=${!seed}
  name=$(basename "$script" .sh)-seed$seed
  if bash "$script" "${@:2:$# - 3}" --seed "$seed" >"$runs/$name.log" 2>&1; then
    echo "$name: $(tail -n 1 "$runs/$name.log")"
  else
    echo "$name FAILED: $(tail -n 1 "$runs/$name.log")"
    exit 1
  fi' row "$runs" "$@" <<<"$rows" || { echo "some runs failed; start the same command again when that is mended" >&2; failed=1; }
"$PYTHON" -m utils.report --runs "$runs" --figs "$runs/Figs"
exit "${failed:-0}"
