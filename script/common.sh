# Shared by every script: the repository root, the Python of script/setup.sh if it made one, and how a run is started.
# Sourced, not run. NPROC=N starts N processes on this machine (GPUs, or CPU processes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # idle threads do not spin: two runs side by side keep their speed

BOOKCORPUS=bookcorpus/bookcorpus@refs/convert/parquet  # the hub's own Parquet of it

if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON="$(command -v python3 || command -v python)"; fi

# has FLAG ARGS...: whether --FLAG, --FLAG=value (with _ or -) is among the arguments
has() {
  local flag=$1 word
  shift
  for word in "$@"; do
    word=${word%%=*}
    [ "${word//-/_}" = "__${flag//-/_}" ] && return 0
  done
  return 1
}

# field NAME: what the JSON on stdin has under it
field() { "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"; }

# prepare_text ARGS...: enwik8 or BookCorpus, where no other text is asked for and every flag is right
prepare_text() {
  local settings dataset
  if has data "$@" || has dataset "$@" || has help "$@" || { ! has model "$@" && [ -e data/enwik8/meta.json ]; }; then return; fi
  settings=$("$PYTHON" -m utils.cli.train "$@")
  dataset=$(field dataset <<<"$settings")
  case $dataset in
    enwik8) "$PYTHON" data/prepare.py enwik8 >/dev/null ;;
    bookcorpus-*)
      if [ ! -e "data/$dataset/meta.json" ]; then
        "$PYTHON" data/prepare_pieces.py "$dataset" --tokenizer "${dataset#bookcorpus-}" --hub "$BOOKCORPUS" >/dev/null
      fi ;;
  esac
}

# start PROGRAM ARGS...: in NPROC processes
start() {
  if [ "${NPROC:-1}" -gt 1 ]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" "$@"
  else
    "$PYTHON" -u "$@"
  fi
}

# pretrain ARGS...: train.py, its text prepared first
pretrain() {
  prepare_text "$@"
  start train.py "$@"
}

# finetune MODEL TASK EXPECTED CHECKPOINT ARGS...: finetune.py, its rows prepared first; every fold of a task that has folds, unless
# --fold chooses one
finetune() {
  local model=$1 task=$2 expected=$3 fold
  shift 3
  if [ $# -eq 0 ] || [ "${1#--}" != "$1" ]; then
    if has help "$@"; then start finetune.py --help; return; fi
    echo "error: usage: bash $0 CHECKPOINT [flags of finetune.py]; CHECKPOINT is the folder of a finished run of train.py" >&2
    exit 2
  fi
  set -- --model "$model" --task "$task" --expect "$expected" --checkpoint "$@"
  "$PYTHON" -m utils.cli.finetune "$@" >/dev/null
  if ! has data "$@" && [ ! -e "data/$task" ]; then "$PYTHON" data/prepare_task.py "$task" >/dev/null; fi
  case $task in
    asdiv_a | mawps)
      if ! has fold "$@"; then
        if has work_dir "$@"; then
          echo "error: five folds cannot share one --work_dir: leave it out, or choose one with --fold" >&2
          exit 2
        fi
        for fold in 0 1 2 3 4; do start finetune.py "$@" --fold "$fold"; done
        return
      fi ;;
  esac
  start finetune.py "$@"
}

# run_rows FOLDER ARGS...: every row's script in the folder for SEEDS ("1 2"), JOBS (2) at a time, those that have a result left out; sets
# `runs`, where they lie, and `failed`
run_rows() {
  local folder=$1 flag settings data rows total jobs=${JOBS:-2}
  shift
  for flag in seed work_dir run_name method; do
    if has "$flag" "$@"; then
      echo "error: --$flag differs from row to row: leave it out (SEEDS=\"1 2\" chooses seeds)" >&2
      exit 2
    fi
  done
  settings=$("$PYTHON" -m utils.cli.train --preset paper "$@")
  prepare_text --preset paper "$@"
  data=$(field data <<<"$settings") runs=$(dirname "$(field work_dir <<<"$settings")")
  if [ ! -e "$data/meta.json" ]; then
    echo "error: $data is no prepared text: make one with data/prepare.py, for bert and roberta with data/prepare_pieces.py" >&2
    exit 2
  fi
  has threads "$@" || set -- "$@" --threads "$(($(nproc) > jobs ? $(nproc) / jobs : 1))"
  mkdir -p "$runs"
  rows=$(for seed in ${SEEDS:-1 2}; do
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
}
