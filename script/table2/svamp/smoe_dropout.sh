#!/usr/bin/env bash
# Table 2, SVAMP from an SMoE-Dropout Transformer-XL: bash script/table2/svamp/smoe_dropout.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: trained on MAWPS and ASDiv-A; settings not published, SST-2's taken.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
finetune transformer_xl svamp smoe_dropout "$@"
