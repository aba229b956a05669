"""The contract of a model's file, and the loading of one registered in utils.flags.models.

Modules named `feed_forward` are counted as feed-forward layers by utils.models.flops.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple, Protocol

from utils.flags.models import MODELS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from utils.data.tokenizer import Vocabulary
    from utils.flags.fields import Flags


class Shape(NamedTuple):
    """Size of one pass: rows, positions of each, positions of memory, positions with a loss (None: all), and sequences in a row, each read
    separately.
    """

    rows: int
    positions: int
    remembered: int = 0
    targets: int | None = None
    sequences: int = 1


class Architecture(Protocol):
    """The file of a model, a module with these functions. Shape suffixes: N rows, T positions, D model width.

    A model that is pre-trained on lanes of a text also has `mem_len`, the number of positions it remembers, which evaluation sets;
    `config.same_length`; `logits(tokens, state) -> (logits, state)`; and `read(tokens, state, targets) -> (losses of the targets, or
    without any logits, state)`, without gradients.
    """

    SIZES: tuple[str, ...]  # the flags of its sizes, as they are recorded
    DROPPED: bool  # whether its last hidden states have gone through dropout; may be left out if not

    @staticmethod
    def build(flags: Flags, vocabulary: Vocabulary | None) -> nn.Module:
        """The dense model, called as model(*inputs, state) -> (token losses in nats, state, logits), with the inputs of its task."""

    @staticmethod
    def blocks(model: nn.Module) -> nn.ModuleList:
        """Its layers."""

    @staticmethod
    def forward_flops(model: nn.Module, shape: Shape, k: int | None) -> int:
        """Operations of one forward pass with k experts active (None: as many as are active now; a dense model has none)."""

    @staticmethod
    def hidden_states(model: nn.Module, tokens_NT: Tensor, lengths_N: Tensor) -> Tensor:
        """The last hidden states [N, T, D] of rows of the given lengths, for fine-tuning."""

    @staticmethod
    def summary(hidden_NTD: Tensor, lengths_N: Tensor) -> Tensor:
        """The hidden state [N, D] that represents the entire row."""

    @staticmethod
    def without_head(model: nn.Module) -> nn.Module:
        """The same model without its output head."""


def architecture(name: str) -> Architecture:
    """The module of a registered model."""
    return importlib.import_module(MODELS[name].module)
