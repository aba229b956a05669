#!/usr/bin/env bash
# Table 2, SST-2 from an SMoE-Dropout BERT: bash script/table2/bert/sst2/smoe_dropout.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: 5,000 steps of 16 sentences, Adam 1e-4, as in the paper.
source "$(dirname "${BASH_SOURCE[0]}")/../../../common.sh"
finetune bert sst2 smoe_dropout "$@"
