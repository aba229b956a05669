#!/usr/bin/env bash
# Table 2, SVAMP from a dense RoBERTa: bash script/table2/roberta/svamp/dense_model.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: trained on MAWPS and ASDiv-A; settings not published, SST-2's taken.
source "$(dirname "${BASH_SOURCE[0]}")/../../../common.sh"
finetune roberta svamp dense "$@"
