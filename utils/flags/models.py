"""The model architectures by the name of --model: what flags, data and tables need to know of each. Imports no torch.

Adding one: a file as described by utils.models.registry.Architecture, and a line in MODELS.
"""

import importlib
from typing import Any, Literal, NamedTuple


class Model(NamedTuple):
    """An architecture as flags and tables know it, without its code.

    title: as in tables. reads: units of the texts that it can read. module: its file. pretraining: place of its pre-training task. presets:
    place of its pre-training presets, flags by preset name. unknown_flags: flags it does not use, refused when given. causal: whether it
    can continue a text. first_position: index of the first position embedding in the transformers library's configuration. from_folder:
    whether it is built as, and with the weights, that a folder of transformers has, so that it always starts from one.
    """

    title: str
    reads: tuple[Literal["bytes", "pieces", "tokens"], ...]
    module: str
    pretraining: str
    presets: str
    unknown_flags: tuple[str, ...] = ()
    causal: bool = True
    first_position: int = 0
    from_folder: bool = False


_XL_FLAGS = (
    *("mem_len", "eval_tgt_len", "d_head", "dropout_only", "pre_lnorm", "same_length", "clamp_len"),
    *("not_tied", "adaptive", "cutoffs", "div_val", "untied_projections", "sample_softmax"),
    *("attn_type", "varlen", "attn_moe", "dense_width", "head_dropout"),
)
_MASKED = "utils.tasks.masked:MaskedLanguageModelling"

MODELS: dict[str, Model] = {
    "transformer_xl": Model(
        *("Transformer-XL", ("bytes", "tokens"), "utils.models.transformer_xl", "utils.tasks.language_modelling:LanguageModelling"),
        *("utils.flags.presets:TRANSFORMER_XL", ("mask_rate",)),
    ),
    "bert": Model("BERT", ("pieces",), "utils.models.bert", _MASKED, "utils.flags.presets:BERT", _XL_FLAGS, causal=False),
    "roberta": Model(
        *("RoBERTa", ("pieces",), "utils.models.roberta", _MASKED, "utils.flags.presets:ROBERTA", _XL_FLAGS),
        causal=False,
        first_position=2,
    ),
    "hf": Model(
        *("transformers", ("tokens",), "utils.models.hf", "utils.tasks.causal:CausalLanguageModelling", "utils.flags.presets:HF"),
        (*_XL_FLAGS, "mask_rate"),
        causal=False,  # by generate.py: transformers' own generate() does that
        from_folder=True,
    ),
}
TRANSFORMERS_FIELDS = {  # fields of a configuration of the transformers library, with their defaults, by flag
    "n_layer": ("num_hidden_layers", 12),
    "d_model": ("hidden_size", 768),
    "n_head": ("num_attention_heads", 12),
    "d_ff": ("intermediate_size", 3072),
    "dropout": ("hidden_dropout_prob", 0.1),
    "dropatt": ("attention_probs_dropout_prob", 0.1),
}


def presets_of(name: str) -> dict[str, dict[str, Any]]:
    """The pre-training presets of a registered model."""
    module, _, attribute = MODELS[name].presets.partition(":")
    return getattr(importlib.import_module(module), attribute)
