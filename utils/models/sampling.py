"""Sampling from a Transformer-XL, byte by byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from mem_transformer import MemTransformerLM


COLDEST = 1e-30  # temperature above which float32 logits stay finite


def write(model: MemTransformerLM, prompt: bytes, length: int, temperature: float, top_p: float, segment: int) -> Iterator[int]:
    """Yields `length` bytes that continue the prompt, which is read `segment` bytes at a time; draws from torch's default generator."""
    import torch

    tokens_1T, cache = torch.tensor([list(prompt)]), None
    for part_1T in tokens_1T.split(segment, 1):
        logits_1TV, cache = model.read(part_1T, cache)
    for _ in range(length):
        byte = draw(logits_1TV[0, -1], temperature, top_p)
        yield int(byte)
        logits_1TV, cache = model.read(byte.view(1, 1), cache)


def draw(logits_V: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draws a symbol by nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751); the likeliest one at temperature 0 or close to it."""
    if temperature < COLDEST:
        return logits_V.argmax()
    p_V, order_V = (logits_V / temperature).softmax(-1).sort(descending=True)
    before_V = p_V.cumsum(-1) - p_V  # mass of all likelier symbols: the likeliest one always stays
    return order_V[p_V.masked_fill(before_V >= top_p, 0.0).multinomial(1)[0]]
