"""The Transformer-XL models that benchmarks compare: with experts, ours and the official way, and dense."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import Common
from benchmarks.peers import official_style
from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout import SMoEConfig, moefy
from utils.models.registry import Shape
from utils.models.transformer_xl import BYTES, forward_flops

OFFICIAL, OURS, DENSE = "official style, experts", "ours, experts", "ours, dense"


@dataclass(frozen=True)
class ModelFlags(Common):
    """Sizes of the model and of a batch."""

    num_experts: int = 16
    """experts per layer"""
    n_layer: int = 4
    """layers"""
    n_head: int = 8
    """attention heads"""
    d_head: int = 64
    """width of a head"""
    d_model: int = 256
    """width of the model"""
    d_expert: int = 512
    """hidden width of an expert; the dense network has that of all experts together"""
    batch_size: int = 4
    """lanes"""
    tgt_len: int = 256
    """positions per segment, and of memory"""
    dropout: float = 0.0
    """dropout rate"""


def contestants(flags: ModelFlags, k: int) -> dict[str, MemTransformerLM]:
    """The same model with experts computed both ways, k of them active, and the dense one of equal parameters."""
    torch.manual_seed(0)
    names = ("n_layer", "n_head", "d_model", "d_head", "dropout")
    sizes = {name: getattr(flags, name) for name in names}
    config = TransformerXLConfig(BYTES, d_inner=flags.num_experts * flags.d_expert, mem_len=flags.tgt_len, **sizes)
    ours = moefy(MemTransformerLM(config), SMoEConfig(num_experts=flags.num_experts, top_k=k))
    models = {OFFICIAL: official_style(ours), OURS: ours, DENSE: MemTransformerLM(config)}
    return {name: model.to(flags.device) for name, model in models.items()}


def random_batches(flags: ModelFlags, length: int, seed: int = 1) -> Iterator[Tensor]:
    """Yields random batches [batch_size, length] endlessly. New tokens for every pass and contestant vary the load of the experts, as in
    training, and no contestant finds the kernels of its sizes built by another.
    """
    draw = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(BYTES, (flags.batch_size, length), generator=draw).to(flags.device)


def least_ratio(models: dict[str, MemTransformerLM], flags: ModelFlags) -> float:
    """Operations of a pass with experts over the dense model's; a training step has three times those of both."""
    shape = Shape(flags.batch_size, flags.tgt_len, flags.tgt_len)
    return round(forward_flops(models[OURS], shape, None) / forward_flops(models[DENSE], shape, None), 4)
