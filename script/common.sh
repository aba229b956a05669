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

# pretrain ARGS...: train.py, its text prepared first
pretrain() {
  prepare_text "$@"
  if [ "${NPROC:-1}" -gt 1 ]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" train.py "$@"
  else
    "$PYTHON" -u train.py "$@"
  fi
}
