#!/usr/bin/env bash
# Table 1, RoBERTa on BookCorpus: dropout 0.1. Any flag of train.py may follow, such as --preset laptop or --seed 2.
# Paper scale: 100,000 steps on a GPU. Published loss: not known.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --model roberta --preset paper --method dense_dropout "$@"
