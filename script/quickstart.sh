#!/usr/bin/env bash
# Installs into .venv, prepares a text, trains at preset quick in parallel dense, smoe, smoe_dropout and what improves on it, elastic k with a
# learned router and the output times E; tests them at every k, prints a table and draws the figures. Rerun to resume.
# Flags of train.py may follow and go to every run, such as --seed 2.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
if wants_help "$@"; then print_header; exit; fi
refuse_flags "method work_dir run_name" "bash script/table1/<method>.sh trains one" "$@"
bash script/setup.sh
PYTHON=.venv/bin/python

"$PYTHON" -m utils.cli.train --preset quick "$@" --method dense >/dev/null  # a wrong flag is refused before anything is downloaded
data=$("$PYTHON" data/prepare.py enwik8 --fallback pystdlib)
set -- --preset quick --seed 1 --data "$data" "$@"
export JOBS=${JOBS:-$(($(cores) < 4 ? $(cores) : 4))} LIVE=1
with_threads "$@"
settings=$("$PYTHON" -m utils.cli.train "$@" --method dense)
runs=$(dirname "$(field work_dir <<<"$settings")") seed=$(field seed <<<"$settings")
for name in dense smoe smoe_dropout elastic_learned_dense_scale; do
  folder=$runs/$name-seed$seed
  row "$name" "$folder" bash "script/table1/$name.sh" "${flags[@]}" --log_interval 200
done
run_rows "$runs/logs"
echo
report table1 "$runs"
if [ "$failed" -ne 0 ]; then exit 1; fi
cat <<END

figures: $(find "$runs/Figs" -name '*.png' | sort | tr '\n' ' ')

At this size no model overfits: expect dense ahead of the two published methods, and the learned elastic one, ours, level with it or ahead, at
half of its experts, too. results/README.md has the findings of longer runs. To go on:
  $PYTHON train.py --eval_only --k 1,2,4 --work_dir $folder    # any k afterwards
  $PYTHON generate.py --checkpoint $folder --k 8 --prompt "The "    # samples text
  $PYTHON train.py --preset quick --method smoe --gate_name noisy_top_k --data $data    # another router
  bash script/table1/smoe_dropout.sh --preset laptop --data $data    # a longer run; docs/experiments.md has them all
END
