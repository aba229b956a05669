#!/usr/bin/env bash
# Table 2, CommonsenseQA from a dense BERT: bash script/table2/bert/csqa/dense_model.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: settings not published, SST-2's taken.
source "$(dirname "${BASH_SOURCE[0]}")/../../../common.sh"
finetune bert csqa dense "$@"
