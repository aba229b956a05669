#!/usr/bin/env bash
# Table 2, CommonsenseQA from a THOR RoBERTa: bash script/table2/roberta/csqa/thor.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: settings not published, SST-2's taken.
source "$(dirname "${BASH_SOURCE[0]}")/../../../common.sh"
finetune roberta csqa thor "$@"
