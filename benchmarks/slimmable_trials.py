"""Ways to make one model slimmable, compared: cut, router, shared experts and correction, as converted and after the same recovery."""

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import smoe_dropout as sd
from benchmarks.slimmable import SlimmableFlags, Text, at, open_model, opened, quality
from utils.errors import UserError

ROOT = Path(__file__).parents[1]
# options of `sd.convert`: cut and router of moefy's split, then cuts, routers, corrections and shared experts one at a time, then CMoE's;
# the unfitted routers again without a correction
TRIALS = (
    {"cut": "contiguous", "router": "random"},
    {"cut": "coactivation", "router": "learned"},
    {"cut": "weights", "router": "learned"},
    {"cut": "random", "router": "learned"},
    {"cut": "contiguous", "router": "learned"},
    {"cut": "coactivation", "router": "random"},
    {"cut": "coactivation", "router": "representative"},
    {"cut": "coactivation", "router": "learned", "correction": "none"},
    {"cut": "coactivation", "router": "learned", "shared_experts": 2},
    {"cut": "coactivation", "router": "learned", "shared_experts": 2, "correction": "mean"},
    {"cut": "coactivation", "router": "mlp"},
    {"cut": "weights", "router": "representative", "shared_experts": 4},
    {"cut": "contiguous", "router": "random", "correction": "none"},
    {"cut": "coactivation", "router": "random", "correction": "none"},
    {"cut": "coactivation", "router": "representative", "correction": "none"},
    {"cut": "weights", "router": "representative", "shared_experts": 4, "correction": "none"},
)
DEFAULTS = {"shared_experts": 0, "correction": "norm"}
# k is drawn from 4 on at every step, and the model learns from itself with all experts active
RECOVERY = {"preset": "laptop", "method": "elastic", "moe_top_k_min": 4, "teacher": "self", "teacher_weight": 1, "train_only": "experts"}
RECOVERY |= {"lr": 5e-5, "eval_interval": 10**6, "max_eval_steps": 1, "max_test_steps": 1, "threads": 1}


def perplexities(model: nn.Module, flags: SlimmableFlags, text: Text) -> dict[str, float]:
    """Perplexity by k."""
    found = {}
    for k in flags.trial_k:
        with at(model, k):
            found[str(k)] = quality(model, text)["perplexity"]
    return found


def converted(flags: SlimmableFlags, options: dict[str, Any], calibration: Text) -> tuple[nn.Module, float]:
    """The dense model converted in one way, and the seconds that this took."""
    model = open_model(flags.dense, flags.device)
    passes = [
        (lambda ids=ids: model(ids.to(model.device), labels=ids.to(model.device), use_cache=False).loss, None)
        for ids in calibration.inputs()
    ]
    short = next(iter(calibration.inputs()))[:1, :8].to(model.device)  # the losses that the conversion measures are of no use here
    held_out = [(lambda: model(short, labels=short, use_cache=False).loss, None)]
    begin = flags.clock()
    sd.convert(model, passes, held_out=held_out, tokens=flags.calibration_tokens, seed=1, **options)
    return model, round(flags.clock() - begin, 1)


def try_out(flags: SlimmableFlags, options: dict[str, Any], text: Text, calibration: Text) -> dict[str, Any]:
    """Seconds of a conversion, and perplexity after it by k."""
    model, seconds = converted(flags, options, calibration)
    found = {"seconds": seconds, "perplexity": perplexities(model, flags, text)}
    print(f"{options}: {found['perplexity']}", flush=True)
    return found


def recover(flags: SlimmableFlags, options: dict[str, Any], text: Text, calibration: Text) -> dict[str, float]:
    """Perplexity by k after a conversion and a short training of its experts, by train.py."""
    from transformers import AutoTokenizer

    model, _ = converted(flags, options, calibration)
    with tempfile.TemporaryDirectory() as folder:
        start, run = Path(folder, "converted"), Path(folder, "recovery")
        sd.save_pretrained(model, start)
        AutoTokenizer.from_pretrained(flags.dense).save_pretrained(start)
        given = {"model": "hf", "start_from": start, "data": flags.recovery, "work_dir": run, "tokens": flags.recovery_tokens} | RECOVERY
        arguments = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        done = subprocess.run([sys.executable, "train.py", *arguments, "--yes"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(done.stderr.strip().splitlines()[-1])
        found = perplexities(open_model(run / "model", flags.device), flags, text)
    print(f"{options}, recovered: {found}", flush=True)
    return found


def run(flags: SlimmableFlags) -> None:
    """Measures every one of `TRIALS` that the record does not have, all with the same texts."""
    text = Text.read(flags.text, flags.dense, flags.trial_tokens, flags.context)
    calibration = Text.read(flags.calibration, flags.dense, flags.calibration_tokens, flags.context)
    budget = {"calibration": calibration.sha256, "tokens": calibration.tokens_BT.numel(), "measured": text.tokens_BT.numel()}
    _, record = opened(flags)
    for options in TRIALS:
        options = {**DEFAULTS, **options}
        key = {"options": {name: options[name] for name in ("cut", "router", "shared_experts", "correction")}, **budget}
        row = record.row("ablation", key, partial(try_out, flags, options, text, calibration))
        if flags.recovery is not None and row.get("recovery_tokens") != flags.recovery_tokens:
            row |= {"recovered": recover(flags, options, text, calibration), "recovery_tokens": flags.recovery_tokens}
            row["recovery_commit"] = record.content["environment"]["commit"]
            record.write()
