"""Folders of models, by a program: `save` a small one in both forms, or a `dense` one of transformers with a tokenizer, or load one and
print a hash of what it computes.
"""

import hashlib
import sys

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import smoe_dropout as sd
from tests import tiny


def main(what: str, folder: str, seed: str = "--seed=1") -> int:
    torch.manual_seed(int(seed.removeprefix("--seed=")))
    config = GPT2Config(vocab_size=31, n_embd=8, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    if what == "dense":
        words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(["[UNK]", *tiny.WORDS[:12]])}, "[UNK]"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
        return 0
    model = sd.moefy(model, sd.SMoEConfig(num_experts=4, top_k=2)).eval()
    if what == "save":
        sd.save_pretrained(model, f"{folder}/pretrained")
        sd.save_model(model, f"{folder}/model")
        return 0
    model = sd.load_weights(model, folder) if what == "load_weights" else sd.from_pretrained(folder)
    with torch.no_grad():
        print(hashlib.sha256(model(torch.arange(20).view(2, 10)).logits.numpy().tobytes()).hexdigest())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (sd.ConfigError, OSError) as error:  # an error of writing says no name
        place = "" if isinstance(error, sd.ConfigError) or error.filename else f"{sys.argv[2]}: "
        print(f"error: {place}{' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
