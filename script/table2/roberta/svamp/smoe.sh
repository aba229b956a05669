#!/usr/bin/env bash
# Table 2, SVAMP from an SMoE RoBERTa: bash script/table2/roberta/svamp/smoe.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: trained on MAWPS and ASDiv-A; settings not published, SST-2's taken.
source "$(dirname "${BASH_SOURCE[0]}")/../../../common.sh"
finetune roberta svamp smoe "$@"
