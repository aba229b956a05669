"""Examination of a finished run, or of a folder of transformers on a text, by the library's microscope: the content of a record."""

import itertools
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smoe_dropout as sd
from smoe_dropout.manifest import sha256
from smoe_dropout.microscope import FEWEST, Report, fluctuation, saturation
from smoe_dropout.options import ConfigError
from utils.checkpoints.manifest import name_of, steps
from utils.checkpoints.storage import Checkpoint
from utils.data.plain_text import read_text, windows
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.derive import evaluation_ks
from utils.models.build import build_model
from utils.training.finished import Finished
from utils.training.routing import examined
from utils.training.run_folder import git_commit
from utils.training.setup import pretraining_task

CHECKPOINTS = 9  # compared at most, so that the earlier ones are eight curves
REMEDY = "restore it from a copy, or train again"


def examine_run(run: Finished, k: int | None, tokens: int) -> dict[str, Any]:
    """Examines the last weights of a run on validation, and compares the routing of its checkpoints. k: default E/2.

    Damaged if a checkpoint is damaged or of another run.
    """
    folder, identity, flags, record, corpus = run
    root, routes = folder / "checkpoints", []
    kept = _spread([step for step in steps(root) if 0 < step <= flags.max_step])
    if kept[-1:] != [flags.max_step]:
        raise UserError(f"{root} lacks the last checkpoint, {name_of(flags.max_step)}: {REMEDY}")
    k = k or max(1, flags.moe_num_expert // 2)
    with Engine(flags) as engine:
        task = pretraining_task(flags, corpus, engine)
        model = engine.prepare(build_model(flags, task.vocabulary))
        for step in kept:
            checkpoint, last = Checkpoint(root / name_of(step), identity, REMEDY), step == flags.max_step
            checkpoint.load_weights(model)
            how = {"ks": evaluation_ks(flags), "without": True} if last else {"sample": FEWEST}
            report = examined(task, model, k, step, tokens, **how)
            routes.append(report.routes)
        split = task.splits[0]
    subject = {name: record[name] for name in ("method", "settings", "preset", "preset_settings", "seed")}
    subject |= {"steps": flags.max_step, "config_sha256": identity, "weights_sha256": {"model.safetensors": checkpoint.weights_sha256}}
    text = {"name": corpus.name, "title": corpus.title, "split": split, "fingerprint": corpus.fingerprint}
    return _content("run", subject, text, report, _changes(kept, routes))


def _spread(found: list[int]) -> list[int]:
    """At most `CHECKPOINTS` of them, evenly spread, with the first and the last."""
    most = min(len(found), CHECKPOINTS)
    return [found[round(place * (len(found) - 1) / max(most - 1, 1))] for place in range(most)]


def _changes(kept: list[int], routes: list[tuple[Tensor, ...]]) -> dict[str, Any] | None:
    """Fluctuation from each checkpoint to the next, and saturation of each earlier one, by layer; None for a single checkpoint."""
    if len(kept) < 2:
        return None

    def by_layer(measure, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> list[float]:
        return [measure(own_NK, its_NK) for own_NK, its_NK in zip(one, other, strict=True)]

    changed = [by_layer(fluctuation, one, other) for one, other in itertools.pairwise(routes)]
    return {"steps": kept, "fluctuation": changed, "saturation": [by_layer(saturation, one, routes[-1]) for one in routes[:-1]]}


def examine_folder(folder: Path, data: str, k: int | None, tokens: int, length: int) -> dict[str, Any]:
    """Examines a model of transformers, converted or with experts of its own, on a text. k: default the model's.

    UserError for a model that cannot be loaded or has no experts, and for a text that is too short.
    """
    text = read_text(data)
    model, tokenizer = _load(folder)
    writes, length = model.can_generate(), min(length, getattr(model.config, "max_position_embeddings", None) or length)

    def predicted(ids_1T: Tensor) -> tuple[Tensor, Tensor] | None:
        output = model(input_ids=ids_1T)
        return (output.logits[:, :-1], ids_1T[:, 1:]) if writes else None

    parts = [torch.tensor([ids], device=model.device) for ids in windows(text, tokenizer, tokens, length, writes)]
    if not parts:
        raise UserError(f"--data {data} is too short: give a text of some thousands of words")
    most = max(layer.num_experts for _, layer in sd.moe_layers(model))
    ks = sorted({1 << power for power in range(most.bit_length())} | {most}) if writes else []
    report = sd.examine(model, [lambda ids_1T=ids_1T: predicted(ids_1T) for ids_1T in parts], k, ks)
    weights = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    subject = {"folder": folder.resolve().name, "model": type(model).__name__, "weights_sha256": weights}
    return _content("model", subject, {"name": Path(data).name, "sha256": sha256(Path(data))}, report, None)


def _load(folder: Path) -> tuple[nn.Module, Any]:
    """A model with experts, and its tokenizer."""
    import transformers

    from smoe_dropout.hf.described import entries_of
    from smoe_dropout.hf.loading import read_config

    try:
        config, _ = read_config(folder, {})
        if entries_of(config):
            model = sd.from_pretrained(folder)
        else:
            kind = getattr(transformers, str((config.architectures or [None])[0]), transformers.AutoModelForCausalLM)
            model = sd.adopt(kind.from_pretrained(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (ConfigError, OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be examined: {' '.join(str(error).split())}") from None
    if model.config.is_encoder_decoder:
        raise UserError(f"{folder} is an encoder with a decoder, which reads two texts: give passes of your own to smoe_dropout.examine")
    return model, tokenizer


def _content(kind: str, subject: dict[str, Any], text: dict[str, Any], report: Report, changes: dict[str, Any] | None) -> dict[str, Any]:
    packages = ("torch", "transformers") if kind == "model" else ("torch",)
    versions = {sd.__name__: sd.__version__, **{name: metadata.version(name) for name in packages}}
    found = {"kind": kind, "subject": subject, "text": text, **report.values(), "checkpoints": changes}
    return found | {"commit": git_commit(), "versions": versions}
