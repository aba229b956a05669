"""Quality of a model on a text, at any number of active experts."""

import math
import time
from contextlib import nullcontext

import numpy as np
import torch

from mem_transformer import MemTransformerLM
from smoe_dropout import top_k
from utils.data import LaneIterator, rank_lanes
from utils.engine import Engine
from utils.flags import Flags
from utils.flops import active_parameters, forward_flops

LN2 = math.log(2)


def evaluation_memory(flags: Flags) -> int:
    """Positions of memory in evaluation: a shorter segment than in training sees as far back in all."""
    return flags.mem_len + flags.tgt_len - flags.eval_tgt_len if flags.mem_len else 0


def forked_random(device: torch.device):
    """Within it, random generators may be seeded and used; afterwards they are as before."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@torch.no_grad()
def evaluate(
    engine: Engine, model: MemTransformerLM, data: np.ndarray, flags: Flags, k: int | None, max_steps: int = -1
) -> dict[str, float]:
    """bits per character over `data`, read in `eval_batch_size` lanes of `eval_tgt_len` with memory, and tokens per second.

    Methods that draw experts draw the same at every evaluation, from the run's seed. k, mode and memory length of the model, and the random
    generators, are as before afterwards. Lanes are shared out over processes; the mean is over all tokens.
    """
    lanes = rank_lanes(flags.eval_batch_size, engine.rank, engine.world_size, training=False)
    was_training, mem_len = model.training, model.mem_len
    model.eval()
    model.mem_len = evaluation_memory(flags)
    loss, tokens, memory, begin = 0.0, 0, None, time.perf_counter()
    try:
        with top_k(model, k) if k is not None else nullcontext(), forked_random(engine.device):
            torch.manual_seed(flags.seed + engine.rank)
            iterator = LaneIterator(data, flags.eval_batch_size, flags.eval_tgt_len, engine.device, lanes)
            for index, segment in enumerate(iterator.one_pass() if len(lanes) else ()):
                if index == max_steps:
                    break
                losses, memory, _ = model(segment.tokens, segment.targets, memory)
                loss += losses.double().sum().item()
                tokens += losses.numel()
    finally:
        model.mem_len = mem_len
        model.train(was_training)
    loss, tokens = engine.sum([loss, tokens])
    return {"bpc": loss / tokens / LN2, "tokens": int(tokens), "tokens_per_second": tokens / (time.perf_counter() - begin)}


def evaluate_all(
    engine: Engine, model: MemTransformerLM, splits: dict[str, np.ndarray], flags: Flags, ks: list[int | None], say
) -> list[dict]:
    """One row for each k: bpc on every split, tokens read, parameters and operations of a token, speed. `say` is told of each row."""
    rows = []
    for k in ks:
        measured = {name: evaluate(engine, model, data, flags, k, flags.max_test_steps) for name, data in splits.items()}
        parameters, ffn_parameters = active_parameters(model, k)
        flops = forward_flops(model, flags.eval_batch_size, flags.eval_tgt_len, evaluation_memory(flags), k)
        row = {"k": k, **{name: values["bpc"] for name, values in measured.items()}}
        row |= {f"{name}_tokens": values["tokens"] for name, values in measured.items()}
        row |= {"active_parameters": parameters, "active_ffn_parameters": ffn_parameters}
        row["flops_per_token"] = flops / (flags.eval_batch_size * flags.eval_tgt_len)
        row["tokens_per_second"] = list(measured.values())[-1]["tokens_per_second"]
        rows.append(row)
        at = "dense" if k is None else f"k = {k}"
        quality = ", ".join(f"{name} {values['bpc']:.4f}" for name, values in measured.items())
        cost = f"{parameters:,} active parameters, {row['flops_per_token']:.3e} FLOPs a token, {row['tokens_per_second']:,.0f} tokens/s"
        say(f"{at:>7}: {quality} bpc; {cost}")
    return rows
