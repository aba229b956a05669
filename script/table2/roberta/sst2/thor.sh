#!/usr/bin/env bash
# Table 2, SST-2 from a THOR RoBERTa: bash script/table2/roberta/sst2/thor.sh CHECKPOINT, a finished run's folder. Any flag of finetune.py may follow.
# Paper scale: 5,000 steps of 16 sentences, Adam 1e-4, as in the paper.
source "$(dirname "${BASH_SOURCE[0]}")/../../../common.sh"
finetune roberta sst2 thor "$@"
