#!/usr/bin/env bash
# Table 2, CommonsenseQA from a dense Transformer-XL: bash script/table2/csqa/dense_model.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: settings not published, SST-2's taken.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
finetune transformer_xl csqa dense "$@"
