#!/usr/bin/env bash
# Make a trained model of transformers slimmable, and measure it: cut, fit, recover, measure. Rerun to resume.
# bash script/slimmable/run_all.sh MODEL TEXT OUT [flags of train.py]; MODEL is a folder of transformers, TEXT plain UTF-8 text, OUT a folder.
# The last 50th of the lines of TEXT is held out: nothing is fitted to it. TOKENS (1000000) of the rest train the recovery; 0: none.
# PACKAGE says in the record where the weights come from, and OTHERS are dense models of other sizes to compare with.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
if [ $# -lt 3 ] || [ ! -d "$1" ] || [ ! -f "$2" ]; then fail "usage: bash $0 MODEL TEXT OUT [flags of train.py]"; fi
model=$1 text=$2 out=$3 budget=${TOKENS:-1000000}
shift 3
refuse_flags "model start_from data work_dir tokens" "MODEL, TEXT, OUT and TOKENS give it" "$@"
mkdir -p "$out"

# 1. text that nothing is fitted to
lines=$(wc -l <"$text")
head -n "$((lines - lines / 50))" "$text" >"$out/train.txt"
tail -n "$((lines / 50))" "$text" >"$out/held_out.txt"

# 2. cut the feed-forward networks, and fit routers to the cut
"$PYTHON" convert.py --from "$model" --data "$out/train.txt" --out "$out/fitted"
stages=("fitted=$out/fitted")

if [ "$budget" != 0 ]; then
  # 3. the text as the model's tokens
  if [ ! -e "$out/tokens/meta.json" ]; then
    "$PYTHON" data/prepare.py "$(basename "$out")" --source "$out/train.txt" --tokenizer "$out/fitted" --out "$out/tokens"
  fi
  # 4. recovery: k drawn at every step from E/4 on, distilled from the model itself with all experts active
  "$PYTHON" train.py --model hf --start_from "$out/fitted" --data "$out/tokens" --work_dir "$out/recovery" --preset laptop \
    --method elastic --moe_top_k_min 4 --teacher self --teacher_weight 1 --train_only experts --lr 5e-5 --tokens "$budget" --yes "$@"
  stages+=("recovered=$out/recovery/model")
fi

# 5. measure every stage at every k
read -ra others <<<"${OTHERS:-}"
"$PYTHON" -m benchmarks slimmable "${stages[@]}" --dense "$model" --text "$out/held_out.txt" --package "${PACKAGE:-}" \
  --others "${others[@]}" --out "$out/records"
