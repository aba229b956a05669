#!/usr/bin/env bash
# Table 2, CommonsenseQA from an SMoE-Dropout Transformer-XL: bash script/table2/csqa/smoe_dropout.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: settings not published, SST-2's taken.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
finetune transformer_xl csqa smoe_dropout "$@"
