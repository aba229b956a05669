"""Sampling at any temperature, and prompts of any bytes."""

import os

import pytest
import torch

from generate import prompt_of
from utils.flags.fields import GenerateFlags
from utils.models.sampling import draw


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-45, 1e-30, 1e-6])
def test_the_likeliest_byte_is_drawn_at_low_temperatures(temperature):
    logits_V = torch.tensor([-80.0, 3.0, 90.0, 89.9])
    assert int(draw(logits_V, temperature, 0.95)) == 2


@pytest.mark.parametrize(
    ("prompt", "expected"), [("é", "é".encode()), (os.fsdecode(b"\xff a\xfe"), b"\xff a\xfe"), ("", b"\n"), ("a\n", b"a\n")]
)
def test_a_prompt_is_continued_as_it_is(prompt, expected):
    assert prompt_of(GenerateFlags(checkpoint="run", prompt=prompt)) == expected
