# Shared by every script: the repository root, the Python of script/setup.sh if it made one, and how a run is started.
# Sourced, not run. NPROC=N starts N processes on this machine (GPUs, or CPU processes).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # idle threads do not spin: two runs side by side keep their speed

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

# prepare_text ARGS...: enwik8, where no other text is asked for and every flag is right
prepare_text() {
  if ! has data "$@" && ! has dataset "$@" && ! has help "$@" && [ ! -e data/enwik8/meta.json ]; then
    "$PYTHON" -m utils.command_line "$@" >/dev/null
    "$PYTHON" data/prepare.py enwik8 >/dev/null
  fi
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
