"""The model architectures by the name of --model. Adding one: a file, and a line in MODELS. Imports no torch.

The file (`module`) defines

    SIZES                                        the flags of its sizes, as they are recorded
    build(flags, vocabulary)                     the dense model, called as model(*inputs, state) -> (token losses, state, logits)
    blocks(model)                                its layers
    forward_flops(model, shape, k)               operations of one forward pass, k experts active (None: as many as are active now)
    hidden_states(model, tokens_NT, lengths_N)   [N, T, D], for fine-tuning
    summary(hidden_NTD, lengths_N)               [N, D]: the position that has seen the whole row
    without_head(model)                          the same model, no longer predicting tokens

A model that reads bytes is pre-trained by language modelling and also has read(tokens_BT, state) -> (logits, state) and
logits(tokens_BT, state) -> (logits, state), `config.same_length`, and a `mem_len` that can be set: positions it remembers.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal, NamedTuple


class Model(NamedTuple):
    """One architecture, without its code.

    title: as in tables. reads: the units of its text, which decide what it is pre-trained on. module: its file. presets: where its
    pre-training presets are, "module:NAME". unknown_flags: those it has no use for, refused when given. causal: whether it can continue a
    text. first_position: index of the first position embedding in the transformers library's configuration.
    """

    title: str
    reads: Literal["bytes", "pieces"]
    module: str
    presets: str
    unknown_flags: tuple[str, ...] = ()
    causal: bool = True
    first_position: int = 0


class Shape(NamedTuple):
    """Size of one pass: rows, positions of each, positions remembered from the pass before, positions with a loss (None: all)."""

    rows: int
    positions: int
    remembered: int = 0
    targets: int | None = None


_NOT_OF_ENCODERS = ("mem_len", "eval_tgt_len", "d_head", "pre_lnorm", "same_length", "clamp_len", "not_tied", "attn_moe", "dense_width")

MODELS: dict[str, Model] = {
    "transformer_xl": Model(
        "Transformer-XL", "bytes", "utils.models.transformer_xl", "utils.flags.presets:TRANSFORMER_XL", unknown_flags=("mask_rate",)
    ),
    "bert": Model("BERT", "pieces", "utils.models.bert", "utils.flags.presets:BERT", _NOT_OF_ENCODERS, causal=False),
    "roberta": Model(
        "RoBERTa", "pieces", "utils.models.roberta", "utils.flags.presets:ROBERTA", _NOT_OF_ENCODERS, causal=False, first_position=2
    ),
}


def architecture(name: str) -> ModuleType:
    """The module of a registered model."""
    return importlib.import_module(MODELS[name].module)


def presets_of(name: str) -> dict[str, dict]:
    """The pre-training presets of a registered model: flags by preset name."""
    module, _, attribute = MODELS[name].presets.partition(":")
    return getattr(importlib.import_module(module), attribute)
