"""How a trained model routes: how evenly experts are used, and how much routes still change late in training.

    python -m utils.training.routing RUN...      measures finished runs anew and puts it into their result.json

Both at k = E/2, on the first batches of validation.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smoe_dropout import moe_layers, top_k
from smoe_dropout.io import load_weights
from utils.checkpoints import storage
from utils.data.corpus import Corpus
from utils.engine import Engine
from utils.errors import UserError, run_main
from utils.flags.derive import stored_flags
from utils.flags.fields import Flags
from utils.tasks.base import Task
from utils.training.evaluation import forked_random
from utils.training.run_folder import RunFolder, write_json

BATCHES = 20  # of validation read


def describe_routing(task: Task, model: nn.Module, checkpoints: Path) -> dict[str, Any] | None:
    """None for a dense model. The model ends with the weights of the last checkpoint.

    load_entropy: entropy of the share of assignments each expert gets, over log E, mean of the layers; 1 is even use. fluctuation: share of
    tokens whose top expert differs between the end and the validation before it (arXiv 2505.00792), mean of the layers; None where that
    checkpoint is not there.
    """
    if not moe_layers(model):
        return None
    flags = task.flags
    k, wanted = max(1, flags.moe_num_expert // 2), (validation_before_the_end(flags), flags.max_step)
    steps = [step for step in storage.steps(checkpoints) if step in wanted]
    chosen = []
    for step in steps:
        load_weights(model, checkpoints / storage.name_of(step))
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
    """The step of the last validation but the one at the end."""
    return (flags.max_step - 1) // flags.eval_interval * flags.eval_interval


@torch.no_grad()
def assignments(task: Task, model: nn.Module, k: int, seed: int) -> list[Tensor]:
    """For each MoE layer the experts of the first validation tokens, the one of the largest gate weight first [N, K]. `seed` is for methods
    that draw experts.
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
    """Entropy of the experts' shares over its largest value, log E; 1 for a single expert."""
    if num_experts == 1:
        return 1.0
    shares_E = torch.bincount(indices_NK.flatten(), minlength=num_experts).double() / indices_NK.numel()
    return torch.special.entr(shares_E).sum().item() / math.log(num_experts)


def main(arguments: list[str]) -> None:
    """Adds `routing` to the result.json of finished runs."""
    from utils.models.registry import architecture

    if not arguments:
        raise UserError("usage: python -m utils.training.routing RUN..., folders of finished runs")
    for folder in map(Path, arguments):
        path = folder / "result.json"
        if not path.exists():
            raise UserError(f"{path} is missing: only a finished run can be described")
        flags = stored_flags(folder)
        with Engine(flags) as engine:
            task = architecture(flags.model).Task(flags, Corpus.open(flags.data), engine)
            model = engine.prepare(task.build())
            routing = describe_routing(task, model, RunFolder.checkpoints_of(flags))
        write_json(path, json.loads(path.read_text()) | {"routing": routing})
        print(f"{folder}: {json.dumps(routing) if routing else 'no experts'}")


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]))
