"""Generation by drafts at fewer experts against plain generation at the same k, by trained models: what is accepted, and what it costs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Common, interleave, summarise
from generate import load
from mem_transformer import MemTransformerLM
from smoe_dropout.sampling import Drafts, write
from utils.cli.generate import parse
from utils.data.corpus import split_file

BASELINE = "plain"


@dataclass(frozen=True)
class SpeculationFlags(Common):
    """Time of generating the likeliest bytes by drafts over that of plain generation."""

    checkpoints: tuple[str, ...] = ()
    """finished runs"""
    data: str = "data/enwik8-2mb"
    """prepared text whose test split the prompts are taken from, evenly spaced"""
    rounds: int = 5
    """rounds measured, after one that warms up"""
    k: tuple[int, ...] = (16, 8)
    """active experts"""
    draft_k: tuple[int, ...] = (1, 4, 8, 12)
    """active experts while drafting; those below k are measured"""
    draft_length: tuple[int, ...] = (1, 2, 4)
    """bytes drafted at a time"""
    prompts: int = 4
    """texts continued in a round"""
    prompt: int = 128
    """bytes of a prompt"""
    tokens: int = 48
    """bytes generated for each"""


def prompts(flags: SpeculationFlags) -> list[bytes]:
    """Evenly spaced parts of the test split."""
    text = split_file(Path(flags.data), "test").read_bytes()
    return [text[begin : begin + flags.prompt] for begin in range(0, len(text) - flags.prompt, len(text) // flags.prompts)][: flags.prompts]


def generator(model: MemTransformerLM, flags: SpeculationFlags, segment: int, drafts: Drafts | None) -> Callable[[], list[bytes]]:
    """Returns a function that continues every prompt."""
    found = prompts(flags)
    return lambda: [bytes(write(model, prompt, flags.tokens, 0.0, 1.0, segment, drafts)) for prompt in found]


def measure(flags: SpeculationFlags, checkpoint: str, k: int) -> Iterator[dict[str, Any]]:
    """Measures every draft_k and draft_length at one k. RuntimeError if a text differs from the plain one."""
    chosen, source = parse(["--checkpoint", checkpoint, "--k", str(k)])
    model, segment = load(chosen, source), source.made.tgt_len
    drafts = {(draft_k, length): Drafts(draft_k, length) for draft_k in flags.draft_k if draft_k < k for length in flags.draft_length}
    calls = {BASELINE: generator(model, flags, segment, None)}
    calls |= {f"{draft_k}, {length}": generator(model, flags, segment, each) for (draft_k, length), each in drafts.items()}
    results = summarise(interleave(calls, flags.rounds), BASELINE)
    expected = calls[BASELINE]()
    for (draft_k, length), each in drafts.items():
        name = f"{draft_k}, {length}"
        if calls[name]() != expected:
            raise RuntimeError(f"{checkpoint} at k = {k} writes another text by drafts of {length} bytes at k = {draft_k}")
        both = {BASELINE: results[BASELINE], "drafts": results[name]}
        accepted = {"drafted": each.drafted, "accepted": each.accepted}
        yield {"run": Path(checkpoint).name, "k": k, "draft_k": draft_k, "draft_length": length, **accepted, "results": both}


def rows(flags: SpeculationFlags) -> list[dict[str, Any]]:
    """A row for each run, k, draft_k and draft_length."""
    return [row for checkpoint in flags.checkpoints for k in flags.k for row in measure(flags, checkpoint, k)]
