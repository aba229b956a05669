#!/usr/bin/env bash
# Table 2, ASDiv-A from an SMoE-Dropout Transformer-XL: bash script/table2/asdiv_a/smoe_dropout.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: all five folds, or --fold N; settings not published, SST-2's taken.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
finetune transformer_xl asdiv_a smoe_dropout "$@"
