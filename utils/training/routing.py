"""Routing and redundancy of experts of a trained model, as its record has them.

They are measured at k = E/2 on the first batches of validation. docs/microscope.md defines each.

    python -m utils.training.routing RUN...    measures finished runs again, and updates their result.json
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import documents
from utils.checkpoints.manifest import name_of
from utils.checkpoints.run_files import REPAIR, RESULT
from utils.documents import Damaged
from utils.errors import Parser, exit_on_user_error
from utils.flags.derive import routes_by_position
from utils.flags.fields import Flags
from utils.training.finished import Finished, open_finished

if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported, so that a wrong folder is refused at once
        parser = Parser(prog="python -m utils.training.routing", description="Measures finished runs again, and updates their result.json.")
        parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run of train.py, with its checkpoints")
        RUNS = [open_finished(folder) for folder in parser.parse_args().runs]

from torch import Tensor, nn

from smoe_dropout import examine, moe_layers
from smoe_dropout.microscope import FEWEST, Report, fluctuation
from utils.checkpoints.storage import Checkpoint
from utils.engine import Engine
from utils.models.build import build_model
from utils.tasks.base import Task
from utils.training.setup import pretraining_task

BATCHES = 20  # validation batches read
BY_LAYER = {  # entries of the record, each the mean over layers of a measure, with its values beside it
    "load_entropy": "load_entropy",
    "dead_experts": "dead_share",
    "output_similarity": "mean_cosine",
}


def describe_routing(
    task: Task, model: nn.Module, checkpoints: Path, identity: str | None = None, lost: list[str] | None = None, remedy: str = REPAIR
) -> dict[str, Any] | None:
    """Measures a model at its last two validations; None for a dense model. Leaves the weights of the last checkpoint in the model.

    Damaged if a checkpoint of the two is missing or damaged, or not of the run with this identity. lost: gets a word for the first one
    instead, and the routing is that of the last.

    load_entropy, dead_experts (a share), output_similarity, and fluctuation between the end and the validation before it, None without that
    checkpoint: means over layers.
    """
    if not moe_layers(model):
        return None
    flags = task.flags
    k, before = max(1, flags.moe_num_expert // 2), validation_before_the_end(flags)
    steps, reports = [], []
    for step in ([before] if before else []) + [flags.max_step]:
        try:
            Checkpoint(checkpoints / name_of(step), identity, remedy).load_weights(model)
        except Damaged:
            if lost is None or step == flags.max_step:
                raise
            lost.append(f"the change of routing since step {step}")
            continue
        steps.append(step)
        reports.append(examined(task, model, k, seed=step, **({} if step == flags.max_step else {"sample": FEWEST})))
    last = reports[-1]
    changed = [*map(fluctuation, reports[0].routes, last.routes)] if len(steps) == 2 else None
    found = {"k": k, "steps": steps}
    for name, measure in BY_LAYER.items():
        found |= {name: last.mean(measure), f"{name}_by_layer": [getattr(layer, measure) for layer in last.layers]}
    return found | {"fluctuation": sum(changed) / len(changed) if changed else None, "fluctuation_by_layer": changed}


def validation_before_the_end(flags: Flags) -> int:
    """The step of the last validation before the one at the end."""
    return (flags.max_step - 1) // flags.eval_interval * flags.eval_interval


def examined(task: Task, model: nn.Module, k: int, seed: int, tokens: int | None = None, **how: Any) -> Report:
    """Examines a model on the first batches of validation, by default `BATCHES`. `seed` is for methods that draw experts.

    tokens: positions to read, in as many batches as it takes. how: further arguments of `examine`.
    """
    with task.evaluation(model):
        return examine(model, passes_of(task, model, tokens), k, **({"without": False} | how), seed=seed)


def passes_of(task: Task, model: nn.Module, tokens: int | None = None) -> list[Callable[[], tuple[Tensor, Tensor] | Tensor]]:
    """Passes over the first batches of validation that return logits and targets, or the loss of a model that leaves out logits. They
    carry on a state, so they must run in order.
    """
    state, passes, read = None, [], 0
    in_segments = routes_by_position(task.flags) and hasattr(model, "read")  # which alone carries a segment over pieces
    for batch in task.held_out(task.splits[0], everything=True):
        if read >= tokens if tokens else len(passes) == BATCHES:
            break

        def run(batch=batch) -> tuple[Tensor, Tensor] | Tensor:
            nonlocal state
            before = None if batch.first else state
            if in_segments:
                logits, state = model.read(batch.inputs[0], before)
            else:
                losses, state, logits = model(*batch.inputs, before)
            return losses.mean() if logits is None else (logits, batch.inputs[-1])

        passes.append(run)
        read += batch.inputs[0].numel()
    return passes


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
