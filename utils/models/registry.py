"""The models that can be pre-trained, one file each, by the name of --model. A file says:

TITLE: as in tables. SIZES: the flags of its sizes, as they are recorded. Task: what it is pre-trained on. build(flags, vocabulary): the
dense model, called as model(*inputs, state) -> (token losses, state, logits). blocks(model): its layers. forward_flops(model, shape, k).

For fine-tuning: hidden_states(model, tokens [N, T], lengths [N]) -> [N, T, D]. summary(hidden, lengths) -> [N, D]: the position that has
seen the whole row. without_head(model): the same, no longer predicting tokens. CAUSAL: whether it can continue a text.
"""

import importlib
from types import ModuleType
from typing import NamedTuple


class Shape(NamedTuple):
    """Of one pass: rows, positions of each, positions remembered from the pass before, positions with a loss (None: all)."""

    rows: int
    positions: int
    remembered: int = 0
    targets: int | None = None


def architecture(name: str) -> ModuleType:
    """The file of a model."""
    return importlib.import_module(f"utils.models.{name}")
