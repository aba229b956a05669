#!/usr/bin/env bash
# Table 2: fine-tunes a pre-trained run on CommonsenseQA. Model and method are the checkpoint's.
# bash script/table2/csqa.sh CHECKPOINT [flags of finetune.py]; CHECKPOINT is the folder of a finished run of train.py.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
finetune csqa "$@"
