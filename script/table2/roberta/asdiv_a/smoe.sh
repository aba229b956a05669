#!/usr/bin/env bash
# Table 2, ASDiv-A from an SMoE RoBERTa: bash script/table2/roberta/asdiv_a/smoe.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: all five folds, or --fold N; settings not published, SST-2's taken.
source "$(dirname "${BASH_SOURCE[0]}")/../../../common.sh"
finetune roberta asdiv_a smoe "$@"
