# Shared by all scripts, sourced by them: finds the repository and its Python, prepares data, starts runs, runs the rows of a table.
# NPROC=N starts N processes on this machine (GPUs or CPU processes).
set -euo pipefail
SCRIPT=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # idle threads do not spin, so that parallel runs do not slow each other down
[ -t 2 ] || export HF_HUB_DISABLE_PROGRESS_BARS=1  # a log has plain lines

BOOKCORPUS=bookcorpus/bookcorpus@refs/convert/parquet  # the hub's Parquet conversion

if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON="$(command -v python3 || command -v python)"; fi

# --- arguments

# has FLAG ARGS...: succeeds if --FLAG or --FLAG=value (spelled with _ or -) is among the arguments
has() {
  local flag=$1 word
  shift
  for word in "$@"; do
    word=${word%%=*}
    [ "${word//-/_}" = "__${flag//-/_}" ] && return 0
  done
  return 1
}

# wants_help ARGS...: succeeds if -h or --help is among the arguments
wants_help() { has help "$@" || [[ " $* " == *" -h "* ]]; }

# print_header: prints the comment at the top of the running script
print_header() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$SCRIPT"; }

# fail MESSAGE: refuses the command line
fail() {
  echo "error: $1" >&2
  exit 2
}

for name in JOBS NPROC STEPS RANK; do
  if [[ ! ${!name:-1} =~ ^[1-9][0-9]*$ ]]; then fail "$name=${!name}: expected a whole number from 1"; fi
done
for name in SEEDS FOLDS KEEP; do
  if [[ ! ${!name:-1} =~ ^[0-9\ ]+$ ]]; then fail "$name=${!name}: expected whole numbers, such as \"1 2\""; fi
done

# refuse_flags "FLAG..." REMEDY ARGS...: refuses flags that a script sets for each row
refuse_flags() {
  local flags=$1 remedy=$2 flag
  shift 2
  for flag in $flags; do
    if has "$flag" "$@"; then fail "--$flag differs from row to row: leave it out ($remedy)"; fi
  done
}

# field NAME [FILE]: prints a field of the JSON object in a file, or on stdin; of an empty one, by a program that has refused its flags, none
field() {
  "$PYTHON" -c '
import json, sys
name, source = sys.argv[1], sys.argv[2] if sys.argv[2:] else "/dev/stdin"
text = None
try:
    text = open(source).read()
    print(json.loads(text)[name])
except (OSError, ValueError, KeyError, TypeError):
    if text != "":
        print(f"error: {source} is missing or damaged: it is no JSON with {name}", file=sys.stderr)
    sys.exit(2)' "$@"
}

# print_settings: prints what the resolved flags on stdin (JSON) train with
print_settings() {
  "$PYTHON" -c '
import json, sys
flags = json.load(sys.stdin)
batch = "{batch_size}" if "task" in flags else "{batch_size} x {tgt_len}"
line = "settings: {model}, preset {preset}: {max_step:,} steps, batch " + batch + ", {optim}, lr {lr:g}, {scheduler}"
print(line.format(**flags), flush=True)'
}

# --- one run

# start PROGRAM ARGS...: runs a program in NPROC processes
start() {
  if [ "${NPROC:-1}" -gt 1 ]; then
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$NPROC" "$@"
  else
    "$PYTHON" -u "$@"
  fi
}

# prepare_text SETTINGS ARGS...: downloads a published text if the resolved flags read it, no other text is named and it is not there
prepare_text() {
  local settings=$1 dataset
  shift
  if has data "$@" || has dataset "$@" || [ -e "$(field data <<<"$settings")/meta.json" ]; then return; fi
  dataset=$(field dataset <<<"$settings")
  case $dataset in
    enwik8 | text8 | wikitext-2 | wikitext-103) "$PYTHON" data/prepare.py "$dataset" >/dev/null ;;
    bookcorpus-*) "$PYTHON" data/prepare_pieces.py "$dataset" --tokenizer "${dataset#bookcorpus-}" --hub "$BOOKCORPUS" >/dev/null ;;
  esac
}

# prepare_task TASK ARGS...: downloads the rows of a task if no other folder is named and they are not there
prepare_task() {
  local task=$1
  shift
  if has data "$@" || [ -e "data/$task" ]; then return; fi
  "$PYTHON" data/prepare_task.py "$task" >/dev/null
}

# pretrain ARGS...: checks the flags of train.py, prepares the text, prints the settings, trains
pretrain() {
  local settings
  if ! wants_help "$@" && ! has eval_only "$@"; then
    settings=$("$PYTHON" -m utils.cli.train "$@")
    prepare_text "$settings" "$@"
    print_settings <<<"$settings"
  fi
  start train.py "$@"
}

# folds_of TASK: prints the folds that a task is measured on, one after the other; nothing for a task with a fixed split
folds_of() { case $1 in asdiv_a | mawps) echo 0 1 2 3 4 ;; esac; }

# check_surgery_flags RUN TASK ARGS...: checks flags that train.py and, unless TASK is empty, finetune.py are given after surgery on RUN
check_surgery_flags() {
  local run=$1 task=$2
  shift 2
  "$PYTHON" -m utils.cli.train --start_from "$run" --max_step "${STEPS:-500}" "$@" >/dev/null
  if [ -n "$task" ]; then "$PYTHON" -m utils.cli.finetune --task "$task" --checkpoint "$run" "$@" >/dev/null; fi
}

# finetune TASK CHECKPOINT ARGS...: checks the flags of finetune.py, prepares the task's rows, prints the settings, fine-tunes; on every
# fold of a task that has folds, unless --fold selects one
finetune() {
  local task=$1 settings folds fold
  shift
  if wants_help "$@"; then
    start finetune.py --help
    return
  fi
  if [ $# -eq 0 ] || [ "${1#--}" != "$1" ]; then
    fail "usage: bash $0 CHECKPOINT [flags of finetune.py]; CHECKPOINT is the folder of a finished run of train.py"
  fi
  set -- --task "$task" --checkpoint "$@"
  settings=$("$PYTHON" -m utils.cli.finetune "$@")
  folds=$(folds_of "$task")
  if has fold "$@"; then folds=""; fi
  if [ -n "$folds" ] && has work_dir "$@"; then
    fail "--work_dir cannot hold all folds of $task: leave it out, or select one with --fold"
  fi
  prepare_task "$task" "$@"
  print_settings <<<"$settings"
  if [ -z "$folds" ]; then start finetune.py "$@"; fi
  for fold in $folds; do start finetune.py "$@" --fold "$fold"; done
}

# --- the rows of a table

rows="" results="" failed=0

# cores: prints the number of CPU cores
cores() { nproc 2>/dev/null || getconf _NPROCESSORS_ONLN; }

# with_threads ARGS...: sets `flags` to the arguments, with the cores shared out among JOBS (2) parallel runs unless --threads is given
with_threads() {
  local jobs=${JOBS:-2}
  flags=("$@")
  has threads "$@" || flags+=(--threads "$(($(cores) > jobs ? $(cores) / jobs : 1))")
}

# prepare_rows ARGS...: checks flags of train.py that hold for all rows and prepares the text; sets `flags`, `settings`, and `runs`, the
# folder the rows' runs are in
prepare_rows() {
  local data
  refuse_flags "seed work_dir run_name method" 'SEEDS="1 2" selects seeds' "$@"
  settings=$("$PYTHON" -m utils.cli.train --preset paper "$@")
  prepare_text "$settings" --preset paper "$@"
  data=$(field data <<<"$settings") runs=$(dirname "$(field work_dir <<<"$settings")")
  if [ ! -e "$data/meta.json" ]; then
    fail "$data is not a prepared text: make it with data/prepare.py, or for bert and roberta with data/prepare_pieces.py"
  fi
  with_threads "$@"
}

# row NAME FOLDER COMMAND...: adds a row for run_rows; FOLDER holds result.json once it is finished
row() {
  local line
  printf -v line '%q ' "$@"
  rows+=${line% }$'\n'  # a trailing blank would join two lines in xargs -L
  results+=$2/result.json$'\n'
}

# rows_left: prints how many rows have no result yet
rows_left() {
  local result count=0
  while IFS= read -r result; do
    if [ -n "$result" ] && [ ! -e "$result" ]; then count=$((count + 1)); fi
  done <<<"$RESULTS"
  echo "$count"
}

# run_row NAME FOLDER COMMAND...: runs one row, its output in LOGS/NAME.log (with LIVE=1 also on stdout), and prints how it ended and how
# long the rows that are left will take at the pace so far
run_row() {
  local name=$1 line left minutes status=0
  shift 2
  if [ -n "${LIVE:-}" ]; then
    "$@" 2>&1 | tee "$LOGS/$name.log" | while IFS= read -r line; do echo "$name | $line"; done
    status=${PIPESTATUS[0]}
  else
    "$@" >"$LOGS/$name.log" 2>&1 || status=1
  fi
  left=$(rows_left) line=$(tail -n 1 "$LOGS/$name.log")
  if [ "$status" -ne 0 ]; then line="FAILED: $line"; fi
  if [ "$left" -gt 0 ] && [ "$left" -lt "$LEFT" ]; then
    minutes=$((($(date +%s) - BEGIN) * left / (LEFT - left) / 60 + 1))
    if [ "$minutes" -lt 60 ]; then left="$left, about $minutes min"; else left="$left, about $((minutes / 60)) h $((minutes % 60)) min"; fi
  fi
  echo "$name: $line (rows left: $left)"
  [ "$status" -eq 0 ]
}

# run_rows LOGS: runs the rows added by `row`, JOBS (2) at a time; a finished run is only checked, an interrupted one resumes. Sets `failed`
run_rows() {
  local jobs=${JOBS:-2} count
  export LOGS=$1 RESULTS=$results LIVE BEGIN LEFT
  mkdir -p "$LOGS"
  rows=${rows%$'\n'} count=$(wc -l <<<"$rows") BEGIN=$(date +%s) LEFT=$(rows_left) LIVE=${LIVE:-}
  echo "$((count)) rows: $((count - LEFT)) finished, $LEFT to run, $jobs at a time; logs: $LOGS/<row>.log"
  export -f run_row rows_left
  xargs -P "$jobs" -L 1 bash -c 'run_row "$@"' row <<<"$rows" || {
    echo "some rows failed: fix the cause and rerun the same command, finished rows are kept" >&2
    failed=1
  }
}

# train_rows FOLDER NAMES ARGS...: trains the rows ROWS (NAMES) of script/FOLDER for SEEDS ("1 2"), then prints and draws Table 1 of them
train_rows() {
  local folder=$1 names=$2 seed name
  shift 2
  prepare_rows "$@"
  for seed in ${SEEDS:-1 2}; do
    for name in ${ROWS:-$names}; do
      [ -e "script/$folder/$name.sh" ] || fail "ROWS: there is no script/$folder/$name.sh"
      row "$name-seed$seed" "$runs/$name-seed$seed" bash "script/$folder/$name.sh" "${flags[@]}" --seed "$seed"
    done
  done
  run_rows "$runs/logs"
  report table1 "$runs"
  exit "$failed"
}

# report TABLE RUNS: prints a table of the finished runs in a folder and draws its figures into RUNS/Figs
report() { "$PYTHON" -m utils.reporting "$1" --runs "$2" --figs "$2/Figs"; }
