"""Sampling from a language model of bytes, one by one, or by the model's own drafts at fewer experts.

The model has `read(tokens [B, T], cache) -> logits [B, T, V], cache`, where the first cache is None, and a cache is a tuple with one entry
per layer that has `forget(count)`: mem_transformer has both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smoe_dropout.control import top_k

Cache = tuple[Any, ...]

COLDEST = 1e-30  # temperature above which float32 logits stay finite


@dataclass
class Drafts:
    """Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192): the model drafts `length` bytes at `k` experts, reads them at once at
    its own k, and keeps those that it would have written itself. `drafted` and `accepted` count bytes.
    """

    k: int
    length: int
    drafted: int = 0
    accepted: int = 0


def write(
    model: nn.Module, prompt: bytes, length: int, temperature: float, top_p: float, segment: int, drafts: Drafts | None = None
) -> Iterator[int]:
    """Yields `length` bytes that continue the prompt, which is read `segment` bytes at a time; draws from torch's default generator.

    With drafts the bytes have the same distribution. At temperature 0 they are the same bytes, unless two are equally likely but for
    rounding. For this every position must attend equally far back (`same_length`), however many are read at once.
    """
    tokens_1T, cache = torch.tensor([list(prompt)]), None
    for part_1T in tokens_1T.split(segment, 1):
        logits_1TV, cache = model.read(part_1T, cache)
    last = draw(logits_1TV[0, -1], temperature, top_p)
    yield int(last)
    left = length - 1
    while left:
        if drafts is None:
            logits_1TV, cache = model.read(last.view(1, 1), cache)
            written_T = draw(logits_1TV[0, -1], temperature, top_p).view(1)
        else:
            written_T = speculate(model, cache, last, min(drafts.length, left - 1), temperature, top_p, drafts)
        yield from written_T.tolist()
        last, left = written_T[-1], left - len(written_T)


def speculate(model: nn.Module, cache: Cache, last: Tensor, count: int, temperature: float, top_p: float, drafts: Drafts) -> Tensor:
    """Reads the last byte and `count` drafted ones; returns the accepted ones and the one that follows, which is not yet read.

    The drafts attend to what was read at the model's own k. Their own keys and values are forgotten before these are verified.
    """
    bytes_T, likely_TV = [last], []
    with top_k(model, drafts.k):
        for _ in range(count):
            logits_1TV, _ = model.read(bytes_T[-1].view(1, 1), cache)
            likely_TV.append(nucleus(logits_1TV[0, -1], temperature, top_p))
            bytes_T.append(likely_TV[-1].multinomial(1)[0])
    forget(cache, count)
    read_T = torch.stack(bytes_T)
    logits_1TV, _ = model.read(read_T[None], cache)
    p_TV = torch.stack([nucleus(logits_V, temperature, top_p) for logits_V in logits_1TV[0]])
    q_TV = torch.stack([*likely_TV, torch.zeros_like(p_TV[0])])
    written_T = verify(read_T[1:], p_TV, q_TV)
    forget(cache, count + 1 - len(written_T))
    drafts.drafted, drafts.accepted = drafts.drafted + count, drafts.accepted + len(written_T) - 1
    return written_T


def forget(cache: Cache, count: int) -> None:
    """Forget the last `count` positions in every layer."""
    for cached in cache:
        cached.forget(count)


def verify(drafted_T: Tensor, p_TV: Tensor, q_TV: Tensor) -> Tensor:
    """Bytes distributed as p: the longest accepted prefix of those drafted from q, and one more (algorithm 1).

    p, q: one row more than bytes; the last of q is 0.
    """
    p_T, q_T = (likely_TV[:-1].gather(1, drafted_T[:, None])[:, 0] for likely_TV in (p_TV, q_TV))
    accepted = int((torch.rand_like(p_T) * q_T < p_T).cumprod(0).sum())
    rest_V = (p_TV[accepted] - q_TV[accepted]).clamp(min=0)
    rest_V = rest_V if rest_V.any() else p_TV[accepted]  # they differ by rounding alone
    return torch.cat([drafted_T[:accepted], rest_V.multinomial(1)])


def nucleus(logits_V: Tensor, temperature: float, top_p: float) -> Tensor:
    """Probability [V] of every symbol in `draw`."""
    if temperature < COLDEST:
        return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
    p_V, order_V = likeliest(logits_V, temperature, top_p)
    return torch.zeros_like(p_V).scatter_(0, order_V, p_V / p_V.sum())


def draw(logits_V: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draws a symbol by nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751); the likeliest one at temperature 0 or close to it."""
    if temperature < COLDEST:
        return logits_V.argmax()
    p_V, order_V = likeliest(logits_V, temperature, top_p)
    return order_V[p_V.multinomial(1)[0]]


def likeliest(logits_V: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities [V] in decreasing order, 0 outside the nucleus, and their symbols [V]."""
    p_V, order_V = (logits_V / temperature).softmax(-1).sort(descending=True)
    before_V = p_V.cumsum(-1) - p_V  # mass of all likelier symbols: the likeliest one always stays
    return p_V.masked_fill(before_V >= top_p, 0.0), order_V
