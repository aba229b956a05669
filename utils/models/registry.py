"""The loading of a model registered in utils.flags.models.

Its file (`module`) defines

    TITLE, SIZES                                 its name in tables, and the flags of its sizes, as they are recorded
    Task                                         what it is pre-trained on
    build(flags, vocabulary)                     the dense model, called as model(*inputs, state) -> (token losses, state, logits)
    blocks(model)                                its layers
    forward_flops(model, shape, k)               operations of one forward pass, k experts active (None: as many as are active now)
    hidden_states(model, tokens_NT, lengths_N)   [N, T, D], for fine-tuning
    summary(hidden_NTD, lengths_N)               [N, D]: the position that has attended to the whole row
    without_head(model)                          the same model without its output layer
    CAUSAL                                       whether it can continue a text
"""

import importlib
from types import ModuleType
from typing import NamedTuple

from utils.flags.models import MODELS


class Shape(NamedTuple):
    """Size of one pass: rows, positions of each, positions remembered from the pass before, positions with a loss (None: all)."""

    rows: int
    positions: int
    remembered: int = 0
    targets: int | None = None


def architecture(name: str) -> ModuleType:
    """The module of a registered model."""
    return importlib.import_module(MODELS[name].module)
