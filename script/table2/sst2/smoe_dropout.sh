#!/usr/bin/env bash
# Table 2: fine-tunes a pre-trained SMoE-Dropout run on SST-2; any other checkpoint is refused.
# bash script/table2/sst2/smoe_dropout.sh CHECKPOINT [flags of finetune.py]; CHECKPOINT is the folder of a finished run of train.py.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
finetune sst2 "$@" --expect smoe_dropout
