"""The command line of generate.py, and what it does: writing on from a prompt, byte by byte."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from utils.checkpoints.origin import Source, open_source
from utils.errors import UserError
from utils.flags.fields import CHOICES, OF_PIECES, Flags

if TYPE_CHECKING:
    from mem_transformer import MemTransformerLM


@dataclass(frozen=True)
class GenerateFlags:
    """Writes on from a prompt with a trained Transformer-XL, at any number of active experts. Bytes in, bytes out."""

    checkpoint: str
    """a finished run of train.py, or one of its checkpoints/step-*"""
    k: int | None = None
    """active experts; default all"""
    prompt: str | None = None
    """what to go on from; default what comes in from a pipe, else a line's end"""
    length: int = 500
    """bytes to write"""
    temperature: float = 0.8
    """0: always the likeliest byte"""
    top_p: float = 0.95
    """draw among the likeliest bytes that have this much probability together"""
    seed: int = 1111
    """random seed"""
    precision: str = "fp32"
    """of the weights: fp32 or bf16"""
    threads: int = 0
    """CPU threads; 0: torch's choice"""


def parse(argv: list[str]) -> tuple[GenerateFlags, Source, Flags]:
    """The command line, the checkpoint, and the flags it was trained with. UserError for what cannot be."""
    flags = tyro.cli(GenerateFlags, args=argv, prog="generate.py")
    source = open_source(Path(flags.checkpoint))
    if "preset" not in source.flags:
        raise UserError(f"{source.path} holds weights alone: give the folder of the run that made them")
    made = Flags(**{field.name: source.flags[field.name] for field in dataclasses.fields(Flags) if field.name in source.flags})
    if mistakes := _mistakes(flags, made):
        raise UserError("; ".join(mistakes))
    return flags, source, made


def _mistakes(flags: GenerateFlags, made: Flags) -> list[str]:
    found = []
    if made.model in OF_PIECES:
        found.append(f"{flags.checkpoint} holds a {made.model}, which fills in gaps: only transformer_xl can write on")
    if flags.k is not None and not made.moe:
        found.append(f"--k {flags.k}: the run in {flags.checkpoint} is dense; leave it out")
    elif flags.k is not None and not 1 <= flags.k <= made.moe_num_expert:
        found.append(f"--k {flags.k} must be from 1 to the {made.moe_num_expert} experts of the run")
    if flags.length < 1:
        found.append(f"--length {flags.length} must be positive")
    if flags.temperature < 0:
        found.append(f"--temperature {flags.temperature} must be 0 or more")
    if not 0 < flags.top_p <= 1:
        found.append(f"--top_p {flags.top_p} must be above 0, and 1 at most")
    if flags.threads < 0:
        found.append(f"--threads {flags.threads} must be 0 or more")
    if flags.precision not in CHOICES["precision"]:
        found.append(f"--precision {flags.precision} must be one of {', '.join(CHOICES['precision'])}")
    return found


def load(flags: GenerateFlags, source: Source, made: Flags) -> MemTransformerLM:
    """The trained model, for inference alone, at k."""
    import torch

    from smoe_dropout import slim
    from utils.checkpoints import weights as transfer
    from utils.models.build import build_model

    model = build_model(made)
    transfer.load(model, source)
    dtype = torch.bfloat16 if flags.precision == "bf16" else None
    model = slim(model, flags.k or made.moe_num_expert, dtype) if made.moe else model.eval().requires_grad_(False).to(dtype)
    if not made.same_length:  # as far back as the last position of a training segment sees
        model.mem_len = made.mem_len + made.tgt_len - 1
    return model
