#!/usr/bin/env bash
# Table 2: fine-tunes a pre-trained run on SST-2. Model and method are the checkpoint's.
# bash script/table2/sst2.sh CHECKPOINT [flags of finetune.py]; CHECKPOINT is the folder of a finished run of train.py.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune sst2 "$@"
