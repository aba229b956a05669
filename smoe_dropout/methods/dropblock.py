"""DropBlock on the FFN's hidden units: contiguous blocks are dropped (Ghiasi, Lin and Le 2018, arXiv 1810.12890).

A block of `width` units starts at each position where it fits with probability gamma = rate / width * H / (H - width + 1) (eq. 1, in one
dimension); units in a block become 0, the others are scaled by units / kept units (algorithm 1). Blocks are drawn for every token. The rate
grows linearly from 0 over training. A block is as wide as an expert, H / blocks: the dense counterpart of dropping experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smoe_dropout.hosts import sites_in_blocks
from smoe_dropout.methods.base import DENSE, Method
from smoe_dropout.options import require
from smoe_dropout.training import FollowsTraining, Reports


@dataclass(frozen=True)
class Options:
    """rate: fraction of units dropped at the end of training. blocks: number of blocks that the hidden units form."""

    rate: float = 0.1
    blocks: int = 16

    def __post_init__(self):
        require(0 <= self.rate < 1, f"option rate = {self.rate} must be from 0 to below 1")
        require(self.blocks >= 1, f"option blocks = {self.blocks} must be at least 1")


class DropBlock(nn.Module, FollowsTraining, Reports):
    """[..., H] -> [..., H], without dropout in evaluation. Without `set_progress` the final rate is used from the start."""

    def __init__(self, width: int, rate: float):
        super().__init__()
        self.width, self.final_rate = width, rate

    @property
    def rate(self) -> float:
        """Dropout rate at the current training step."""
        return self.final_rate * (1.0 if self.step is None else self.progress)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> [..., H]."""
        if not self.training or self.rate == 0:
            return hidden
        H = hidden.shape[-1]
        gamma = self.rate / self.width * H / (H - self.width + 1)
        begins = torch.rand(*hidden.shape[:-1], H - self.width + 1, device=hidden.device) < gamma
        kept = ~covered(begins, self.width)
        return hidden * (kept * (kept.numel() / kept.sum().clamp(min=1))).to(hidden.dtype)

    def metrics(self) -> dict[str, float]:
        """Current dropout rate."""
        return {"rate": self.rate}


def covered(begins: Tensor, width: int) -> Tensor:
    """Mask of units inside a block, given the mask of block starts: [..., H - width + 1] -> [..., H]."""
    padded = nn.functional.pad(begins.to(torch.int32), (width, width - 1)).cumsum(-1)
    return padded[..., width:] > padded[..., :-width]


def convert(model: nn.Module, options: Options) -> nn.Module:
    """Replace the hidden units' dropout in every feed-forward network with DropBlock. ConfigError if `blocks` does not divide a width."""
    for site in sites_in_blocks(model, options.blocks):
        site.put_dropout(DropBlock(site.d_ff // options.blocks, options.rate))
    return model


METHOD = Method(
    name="dropblock",
    title="Dense, DropBlock",
    source="arXiv 1810.12890; arXiv 2303.01610, Table 1",
    sparse=False,
    flags=DENSE,
    options=Options,
    convert=convert,
)
