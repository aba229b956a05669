"""The library's folders, by a program: `save` a small model in both forms, or load one and print a hash of what it computes."""

import hashlib
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import smoe_dropout as sd


def main(what: str, folder: str, seed: str = "--seed=1") -> int:
    torch.manual_seed(int(seed.removeprefix("--seed=")))
    config = GPT2Config(vocab_size=31, n_embd=8, n_layer=2, n_head=2, n_positions=12, bos_token_id=0, eos_token_id=0)
    model = sd.moefy(GPT2LMHeadModel(config), sd.SMoEConfig(num_experts=4, top_k=2)).eval()
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
