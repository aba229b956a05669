"""Sampling at any temperature, with and without drafts, and prompts of any bytes."""

import math
import os
from collections import Counter
from itertools import product

import pytest
import torch

from generate import prompt_of
from mem_transformer import KeyValueCache, MemTransformerLM, TransformerXLConfig
from smoe_dropout import SMoEConfig, moefy, top_k
from smoe_dropout.sampling import Drafts, draw, nucleus, write
from utils.flags.declare import specs
from utils.flags.fields import GenerateFlags


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-45, 1e-30, 1e-6])
def test_the_likeliest_byte_is_drawn_at_low_temperatures(temperature):
    logits_V = torch.tensor([-80.0, 3.0, 90.0, 89.9])
    assert int(draw(logits_V, temperature, 0.95)) == 2


@pytest.mark.parametrize(
    ("prompt", "expected"), [("é", "é".encode()), (os.fsdecode(b"\xff a\xfe"), b"\xff a\xfe"), ("", b"\n"), ("a\n", b"a\n")]
)
def test_a_prompt_is_continued_as_it_is(prompt, expected):
    assert prompt_of(GenerateFlags(checkpoint="run", prompt=prompt)) == expected


def model_of(symbols: int, init_std: float, **sizes: object) -> MemTransformerLM:
    """A model of 4 experts that writes different texts at different k."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 8, "d_head": 4, "d_inner": 32, "same_length": True, "init_std": init_std, **sizes}
    return moefy(MemTransformerLM(TransformerXLConfig(symbols, **sizes)), SMoEConfig(num_experts=4, top_k=4, init_std=1.0)).eval()


@pytest.mark.parametrize(("k", "draft_k", "length"), [(4, 1, 9), (4, 3, 9), (2, 1, 2)])
def test_drafts_change_no_byte(k, draft_k, length):
    """In float64, where rounding makes no two bytes equally likely."""
    model, drafts = model_of(50, 0.7, mem_len=9, tie_weight=False).double(), Drafts(draft_k, length)
    with top_k(model, k):
        plain, drafted = (list(write(model, bytes([3, 1, 4]), 70, 0.0, 1.0, 4, given)) for given in (None, drafts))
    assert plain == drafted and len(set(plain)) > 4
    assert 0 < drafts.accepted < drafts.drafted


def test_drafts_are_never_longer_than_what_can_be_forgotten():
    assert specs(GenerateFlags)["draft_length"].high <= KeyValueCache.SPARE


def text_probabilities(model: MemTransformerLM, prompt: bytes, *how: float) -> dict[tuple[int, ...], float]:
    """Probability of each text of three symbols."""
    texts = list(product(range(4), repeat=3))
    logits_BTV = model.read(torch.tensor([[*prompt, *text] for text in texts]))[0][:, len(prompt) - 1 :]
    steps = [
        [nucleus(logits_TV[i], *how)[symbol] for i, symbol in enumerate(text)] for text, logits_TV in zip(texts, logits_BTV, strict=True)
    ]
    return {text: math.prod(map(float, step)) for text, step in zip(texts, steps, strict=True)}


def surprise(seen: Counter, probability: dict[tuple[int, ...], float]) -> float:
    """Chi-squared statistic of the last two symbols over the threshold that it passes with probability 0.001."""
    expected = Counter()
    for text, p in probability.items():
        expected[text[1:]] += p * seen.total()
    possible = [text for text, mean in expected.items() if mean > 0]
    if not set(seen) <= set(possible):
        return math.inf
    df = len(possible) - 1
    threshold = df * (1 - 2 / (9 * df) + 3.09 * math.sqrt(2 / (9 * df))) ** 3  # Wilson and Hilferty
    return sum((seen[text] - expected[text]) ** 2 / expected[text] for text in possible) / threshold


def test_drafts_do_not_change_the_distribution():
    """The texts fit the model's own k, and could not have been written at that of the drafts."""
    model, prompt, drafts, how = model_of(4, 0.3, n_layer=1, mem_len=9), bytes([1, 2]), Drafts(1, 2), (0.7, 0.9)
    seen = Counter(tuple(write(model, prompt, 3, *how, 9, drafts))[1:] for _ in range(150))
    assert surprise(seen, text_probabilities(model, prompt, *how)) < 1
    with top_k(model, drafts.k):
        at_draft_k = text_probabilities(model, prompt, *how)
    assert surprise(seen, at_draft_k) > 1 and 0 < drafts.accepted < drafts.drafted
