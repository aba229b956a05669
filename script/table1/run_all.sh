#!/usr/bin/env bash
# Trains every row of Table 1 that has no result yet, JOBS (2) at a time, for SEEDS ("1 2"), then prints the table and draws its figures.
# Rerun to resume. Flags of train.py that hold for all rows may follow, such as --model bert, --preset laptop or --data DIR.
# ROWS selects rows by the names of the scripts in this folder, such as ROWS="dense smoe smoe_dropout"; default all of them, for bert and
# roberta those of the paper and elastic.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
if wants_help "$@"; then print_header; exit; fi
settings=$("$PYTHON" -m utils.cli.train --preset paper "$@")
names="dense dense_dropout concrete_dropout dropblock smoe thor smoe_dropout elastic"
if [ "$(field model <<<"$settings")" = transformer_xl ]; then
  names+=" smoe_dropout_with_dropout smoe_k2 elastic_dense_scale elastic_learned_dense_scale smoe_dense_scale smoe_dropout_dense_scale"
  names+=" sandwich block_dropout competesmoe competesmoe2 momentumsmoe adamsmoe similarity attention"
  names+=" matryoshka moe_plus_plus deepseek sigma_moe s_base xmoe remoe z_loss top_p hyper_router expert_choice stable_moe adamoe self_routing"
fi
train_rows table1 "$names" "$@"
