"""Routing statistics of a trained model: how evenly experts are used, and how much routing still changes late in training.

Both are measured at k = E/2 on the first batches of validation.

    python -m utils.training.routing RUN...    measures finished runs again, and updates their result.json
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

from utils import documents
from utils.checkpoints.manifest import name_of
from utils.checkpoints.run_files import REPAIR, RESULT, config_sha256, read_config, read_result
from utils.data.corpus import Corpus
from utils.documents import Damaged
from utils.errors import UserError, exit_on_user_error
from utils.flags.declare import flags_from
from utils.flags.fields import Flags
from utils.flags.models import MODELS


class Finished(NamedTuple):
    """A finished run of train.py. identity: its config_sha256."""

    folder: Path
    identity: str
    flags: Flags
    record: dict[str, Any]
    corpus: Corpus


def open_finished(folders: list[str]) -> list[Finished]:
    """Raises UserError unless all are finished runs of train.py, with their data."""
    if not folders:
        raise UserError("usage: python -m utils.training.routing RUN..., folders of finished runs")
    return [_open(Path(folder)) for folder in folders]


def _open(folder: Path) -> Finished:
    config = read_config(folder)
    identity, flags = config_sha256(config), flags_from(config, Flags)
    record = read_result(folder, identity)
    if record is None or "task" in config:
        fault = "is missing" if record is None else "is of finetune.py"
        raise UserError(f"{folder / RESULT} {fault}: only a finished run of train.py can be measured")
    corpus = Corpus.open(flags.data, MODELS[flags.model].reads)
    corpus.verify()
    if config.get("data_fingerprint", corpus.fingerprint) != corpus.fingerprint:
        raise UserError(f"{flags.data} does not hold the {corpus.unit} of the run in {folder}: put the run's data there again")
    return Finished(folder, identity, flags, record, corpus)


if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported, so that a wrong folder is refused at once
        RUNS = open_finished(sys.argv[1:])

import torch
from torch import Tensor, nn

from smoe_dropout import moe_layers, top_k
from utils.checkpoints.storage import Checkpoint
from utils.engine import Engine
from utils.models.build import build_model
from utils.tasks.base import Task
from utils.training.evaluation import forked_random
from utils.training.setup import pretraining_task

BATCHES = 20  # validation batches read


def describe_routing(
    task: Task, model: nn.Module, checkpoints: Path, identity: str | None = None, lost: list[str] | None = None, remedy: str = REPAIR
) -> dict[str, Any] | None:
    """Measures a model at its last two validations; None for a dense model. Leaves the weights of the last checkpoint in the model.

    Damaged if a checkpoint of the two is missing or damaged, or not of the run with this identity. lost: gets a word for the first one
    instead, and the routing is that of the last.

    load_entropy: entropy of the shares of assignments that experts get, divided by log E, mean over layers; 1 is even use. fluctuation:
    share of tokens whose top expert differs between the end and the validation before it (arXiv 2505.00792), mean over layers; None without
    that checkpoint.
    """
    if not moe_layers(model):
        return None
    flags = task.flags
    k, before = max(1, flags.moe_num_expert // 2), validation_before_the_end(flags)
    steps, chosen = [], []
    for step in ([before] if before else []) + [flags.max_step]:
        try:
            Checkpoint(checkpoints / name_of(step), identity, remedy).load_weights(model)
        except Damaged:
            if lost is None or step == flags.max_step:
                raise
            lost.append(f"the change of routing since step {step}")
            continue
        steps.append(step)
        chosen.append(assignments(task, model, k, seed=step))
    changed = [(one[:, 0] != other[:, 0]).double().mean().item() for one, other in zip(*chosen, strict=True)] if len(steps) == 2 else None
    sizes = [layer.num_experts for _, layer in moe_layers(model)]
    entropies = [load_entropy(indices_NK, size) for indices_NK, size in zip(chosen[-1], sizes, strict=True)]
    return {
        "k": k,
        "steps": steps,
        "load_entropy": sum(entropies) / len(entropies),
        "load_entropy_by_layer": entropies,
        "fluctuation": sum(changed) / len(changed) if changed else None,
        "fluctuation_by_layer": changed,
    }


def validation_before_the_end(flags: Flags) -> int:
    """The step of the last validation before the one at the end."""
    return (flags.max_step - 1) // flags.eval_interval * flags.eval_interval


@torch.no_grad()
def assignments(task: Task, model: nn.Module, k: int, seed: int) -> list[Tensor]:
    """For each MoE layer the experts of the first validation tokens [N, K], in descending order of gate weight. `seed` is for methods that
    draw experts.
    """
    device = next(model.parameters()).device
    layers, seen, state, was_training = [layer for _, layer in moe_layers(model)], [], None, model.training
    model.eval()
    with task.evaluation(model), top_k(model, k), forked_random(device):
        torch.manual_seed(seed)
        for _, batch in zip(range(BATCHES), task.held_out("valid", everything=True), strict=False):
            _, state, _ = model(*batch.inputs, state)
            seen.append([layer.assigned.cpu() for layer in layers])
    model.train(was_training)
    return [torch.cat(parts) for parts in zip(*seen, strict=True)]


def load_entropy(indices_NK: Tensor, num_experts: int) -> float:
    """Entropy of the experts' shares divided by its maximum, log E; 1 for a single expert."""
    if num_experts == 1:
        return 1.0
    counts_E = torch.bincount(indices_NK.flatten() + 1, minlength=num_experts + 1)[1:].double()  # without -1, fewer than K experts
    shares_E = counts_E / counts_E.sum().clamp(min=1)
    return torch.special.entr(shares_E).sum().item() / math.log(num_experts)


def main(runs: list[Finished]) -> None:
    """Replaces `routing` in the result.json of finished runs."""
    for folder, identity, flags, record, corpus in runs:
        with Engine(flags) as engine:
            task = pretraining_task(flags, corpus, engine)
            model = engine.prepare(build_model(flags, task.vocabulary))
            routing = describe_routing(task, model, folder / "checkpoints", identity, remedy="restore it from a copy, or train again")
        documents.write(folder / RESULT, record | {"routing": routing})
        print(f"{folder}: {json.dumps(routing) if routing else 'no experts'}")


if __name__ == "__main__":
    with exit_on_user_error():
        main(RUNS)
