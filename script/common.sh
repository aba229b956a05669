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
  settings=$("$PYTHON" -m utils.command_line "$@")
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
  "$PYTHON" -m utils.finetuning "$@" >/dev/null
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
