"""Dense model with dropout of expert-sized blocks: --dense_drop of arXiv 2303.01610's code.

In each training pass every block of H / blocks hidden units is dropped as a whole with probability `rate`; kept blocks are scaled by
1 / (1 - rate), which the official code omits. Official blocks are every E-th unit, here they are contiguous; at initialisation units are
interchangeable.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.hosts import sites_in_blocks
from smoe_dropout.methods.base import Method
from smoe_dropout.options import require
from smoe_dropout.training import synchronized


@dataclass(frozen=True)
class Options:
    """rate: probability of dropping a block (official --expert_drop). blocks: number of blocks."""

    rate: float = 0.5
    blocks: int = 16

    def __post_init__(self):
        require(0 <= self.rate < 1, f"option rate = {self.rate} must be from 0 to below 1")
        require(self.blocks >= 1, f"option blocks = {self.blocks} must be at least 1")


class BlockDropout(nn.Module):
    """[..., H] -> [..., H]: the hidden units' own dropout, then one draw of blocks for all tokens."""

    def __init__(self, options: Options, inner: float):
        super().__init__()
        self.options, self.inner = options, nn.Dropout(inner)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> [..., H]."""
        if not self.training:
            return hidden
        keep = synchronized(torch.rand(self.options.blocks, 1, device=hidden.device)) >= self.options.rate
        scale = keep / (1 - self.options.rate)
        blocks = self.inner(hidden).unflatten(-1, (self.options.blocks, -1))
        return (blocks * scale.to(hidden.dtype)).flatten(-2)


def convert(model: nn.Module, options: Options) -> nn.Module:
    """Add block dropout to every feed-forward network. ConfigError if `blocks` does not divide a width."""
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
