#!/usr/bin/env bash
# Table 1, BERT on BookCorpus: THOR, one random expert a layer and pass, two passes (Zuo et al. 2021). Any flag of train.py may follow, such as --preset laptop or --seed 2.
# Paper scale: 100,000 steps on a GPU. Published loss: not known.
source "$(dirname "${BASH_SOURCE[0]}")/../../common.sh"
pretrain --model bert --preset paper --method thor "$@"
