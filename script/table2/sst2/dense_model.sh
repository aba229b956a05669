#!/usr/bin/env bash
# Table 2: fine-tunes a pre-trained run without experts on SST-2; any other checkpoint is refused.
# bash script/table2/sst2/dense_model.sh CHECKPOINT [flags of finetune.py]; CHECKPOINT is the folder of a finished run of train.py.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
finetune sst2 "$@" --expect dense
