"""Adaptive softmax, forward and backward: ours against torch's, on words as frequent as Zipf's law has it, alone and with the embedding.

torch has no adaptive embedding: its contestant there has a plain one. Ours also projects to the first cluster, and has biases in the
later ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Common, compare
from utils.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax

OURS, BASELINE = "ours", "torch"


@dataclass(frozen=True)
class SoftmaxFlags(Common):
    """Time of the adaptive softmax over that of torch.nn.AdaptiveLogSoftmaxWithLoss, in fp32."""

    n_token: int = 250_000
    """words"""
    d_model: int = 410
    """width of the model"""
    cutoffs: tuple[int, ...] = (20_000, 40_000, 200_000)
    """where each later cluster begins"""
    div_val: int = 4
    """by which a cluster's width is that of the one before divided"""
    batch_size: int = 10
    """lanes"""
    tgt_len: int = 150
    """positions per segment"""


class Ours(nn.Module):
    """Embedding and head, with tied tables and projections unless the head is alone."""

    def __init__(self, flags: SoftmaxFlags, alone: bool):
        super().__init__()
        sizes = (flags.n_token, flags.d_model, flags.cutoffs, flags.div_val, 0.02)
        self.embedding = AdaptiveEmbedding(*sizes)
        self.head = AdaptiveSoftmax(*sizes, embedding=self.embedding, tied_weight=not alone, tied_projections=not alone)

    def losses(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Losses [B, T]."""
        return self.head.losses(hidden_BTD, targets_BT)[0]


class Torchs(nn.Module):
    """A plain embedding and torch's adaptive softmax."""

    def __init__(self, flags: SoftmaxFlags):
        super().__init__()
        self.embedding = nn.Embedding(flags.n_token, flags.d_model)
        self.head = nn.AdaptiveLogSoftmaxWithLoss(flags.d_model, flags.n_token, list(flags.cutoffs), float(flags.div_val), head_bias=True)

    def losses(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Losses [B, T]."""
        return -self.head(hidden_BTD.flatten(0, 1), targets_BT.flatten())[0].view_as(targets_BT)


def batches(flags: SoftmaxFlags) -> Iterator[Tensor]:
    """Words and the word after each [B, T + 1], others in every batch; word v has a probability of 1 / (v + 1), normalised."""
    draw = torch.Generator().manual_seed(0)
    frequency_V = 1 / torch.arange(1, flags.n_token + 1, dtype=torch.float64)
    while True:
        drawn = torch.multinomial(frequency_V, flags.batch_size * (flags.tgt_len + 1), replacement=True, generator=draw)
        yield drawn.view(flags.batch_size, -1).to(flags.device)


def step(model: Ours | Torchs, flags: SoftmaxFlags, alone: bool) -> Callable[[], tuple[Tensor, ...]]:
    """Returns a function that computes the mean loss of a new batch, and gradients; alone: of the head, from random hidden states."""
    given, parameters = batches(flags), list((model.head if alone else model).parameters())
    hidden_BTD = torch.randn(flags.batch_size, flags.tgt_len, flags.d_model, device=flags.device, requires_grad=True)

    def run() -> tuple[Tensor, ...]:
        batch = next(given)
        x_BTD = hidden_BTD if alone else model.embedding(batch[:, :-1])
        loss = model.losses(x_BTD, batch[:, 1:]).mean()
        return loss, *torch.autograd.grad(loss, [*parameters, *[hidden_BTD] * alone], allow_unused=True)  # torch's skips empty clusters

    return run


def rows(flags: SoftmaxFlags) -> list[dict[str, Any]]:
    """A row for the head alone, and one for embedding and head."""
    found = []
    for alone in (True, False):
        torch.manual_seed(0)
        models = {BASELINE: Torchs(flags), OURS: Ours(flags, alone)}
        calls = {name: step(model.to(flags.device), flags, alone) for name, model in models.items()}
        found.append({"work": "head" if alone else "embedding and head", "results": compare(calls, flags, BASELINE)})
    return found
