"""The dense model with whole expert-sized blocks dropped: --dense_drop of arXiv 2303.01610's code.

In training each block of H / blocks hidden units is dropped for every pass as a whole with probability `rate`; kept ones are scaled by
1 / (1 - rate), which the official code leaves out. Its blocks are every E-th unit, these are neighbours; units are alike when training
begins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.hosts import sites_in_blocks
from smoe_dropout.methods.base import Method
from smoe_dropout.options import require
from smoe_dropout.training import shared


@dataclass(frozen=True)
class Options:
    """rate: probability of dropping a block (official --expert_drop). blocks: how many there are."""

    rate: float = 0.5
    blocks: int = 16

    def __post_init__(self):
        require(0 <= self.rate < 1, f"option rate = {self.rate} must be from 0 to below 1")
        require(self.blocks >= 1, f"option blocks = {self.blocks} must be at least 1")


class BlockDropout(nn.Module):
    """[..., H] -> [..., H]: one draw of blocks for all tokens; then the hidden units' own dropout."""

    def __init__(self, options: Options, inner: float):
        super().__init__()
        self.options, self.inner = options, nn.Dropout(inner)

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training:
            return hidden
        keep = shared(torch.rand(self.options.blocks, 1, device=hidden.device)) >= self.options.rate
        scale = keep / (1 - self.options.rate)
        blocks = self.inner(hidden).unflatten(-1, (self.options.blocks, -1))
        return (blocks * scale.to(hidden.dtype)).flatten(-2)


def convert(model: nn.Module, options: Options) -> nn.Module:
    """Block dropout in every feed-forward network. ConfigError if a width is not divided by the number of blocks."""
    for site in sites_in_blocks(model, options.blocks):
        site.put_dropout(BlockDropout(options, site.dropout))
    return model


METHOD = Method(
    name="block_dropout",
    title="Dense, block dropout",
    source="arXiv 2303.01610, official code",
    sparse=False,
    flags={"moe": False, "dense_drop": True},
    options=Options,
    convert=convert,
)
