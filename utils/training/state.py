"""The state of a run at a step, and its checkpoints: saving, resuming from one, and choosing the weights to be tested."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from smoe_dropout import moe_layers
from smoe_dropout.io import save_model
from utils.checkpoints import storage
from utils.checkpoints.manifest import STATE, Stored, name_of, steps, verify
from utils.checkpoints.run_files import REPAIR
from utils.checkpoints.storage import Checkpoint
from utils.documents import Content, Damaged
from utils.errors import UserError
from utils.flags.derive import last_top_k
from utils.tasks.base import State as Carried
from utils.training.averaging import WeightAverage
from utils.training.evaluation import evaluate
from utils.training.optimizer import Plateau
from utils.training.routing import validation_before_the_end
from utils.training.run import Run
from utils.training.run_folder import RunFolder

BELONGING = ("config_sha256", "metrics")  # entries of a state.json that are no fields of `State`


@dataclass
class State:
    """Progress of a run, besides weights, optimiser, the model's carried state and random generators."""

    step: int = 0
    loss_sum: float = 0.0  # nats since the last log line, over this process's tokens
    loss_tokens: int = 0
    best: float | None = None  # lower is better: negated for a metric that grows with quality; None before the first validation
    best_step: int = 0
    seconds: float = 0.0  # wall time of training steps, without validations
    cpu_seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    data: dict[str, Any] = field(default_factory=dict)
    plateau: dict[str, Any] = field(default_factory=dict)
    world_size: int = 1
    lost: list[str] = field(default_factory=list)  # what --repair had to give up


class OfProcess(TypedDict):
    """The state of one process."""

    loss_sum: float
    loss_tokens: int


def save(
    folder: RunFolder | None,
    run: Run,
    model: nn.Module,
    optimizer,
    carried: Carried,
    state: State,
    plateau: Plateau,
    average: WeightAverage | None,
) -> None:
    """Writes a checkpoint by all processes, and deletes all but the last two, the best, and that of the validation before the end."""
    engine, root = run.engine, RunFolder.checkpoints_of(run.flags)
    state.plateau = plateau.state_dict()
    writer = storage.Writer(root, state.step, engine.is_main)
    engine.barrier()
    writer.add(f"rank{engine.rank}.safetensors", storage.rank_tensors(carried, engine.device))
    writer.add_json(f"rank{engine.rank}.json", {"loss_sum": state.loss_sum, "loss_tokens": state.loss_tokens})
    engine.barrier()
    if folder is not None:
        save_model(model, writer.partial, manifest=False)  # the checkpoint has its own
        writer.add("optimizer.safetensors", storage.optimizer_tensors(optimizer))
        if average:
            writer.add("average.safetensors", average.state())
        if tensors := run.tensors():
            writer.add("task.safetensors", tensors)
        writer.add_json(STATE, asdict(state) | {"config_sha256": folder.config_sha256, "metrics": folder.synced_metrics()})
        writer.finish()
        storage.prune(root, state.step, keep={state.best_step, validation_before_the_end(run.flags)})
    engine.barrier()


def restore(
    checkpoint: Checkpoint, run: Run, model: nn.Module, optimizer, plateau: Plateau, average: WeightAverage | None
) -> tuple[State, Carried, Content | None]:
    """Restores everything from a checkpoint. UserError for another number of processes.

    Returns state and carried state as saved, and size and hash of metrics.jsonl at that time; None in older runs.
    """
    engine, folder = run.engine, checkpoint.folder
    recorded = checkpoint.json(STATE, Stored)
    stored = {"lost": []} | {name: value for name, value in checkpoint.json(STATE, State).items() if name not in BELONGING}
    if stored.keys() != {entry.name for entry in fields(State)}:
        raise UserError(f"{folder} was made by another version of this program: choose another --work_dir")
    state = State(**stored)
    if state.world_size != engine.world_size:
        raise UserError(f"{folder} was made by {state.world_size} processes, and this run has {engine.world_size}: start the same number")
    state = replace(state, **checkpoint.json(f"rank{engine.rank}.json", OfProcess))
    checkpoint.load_weights(model)
    storage.load_optimizer(optimizer, checkpoint.tensors("optimizer.safetensors"))
    if average:
        average.load_state(checkpoint.tensors("average.safetensors"))
    if run.tensors():
        tensors = checkpoint.tensors("task.safetensors")
        for callback in run.callbacks:
            callback.load_tensors(tensors)
    run.task.load_state_dict(state.data | {"step": state.step})  # older runs on a text saved no step with their position
    plateau.load_state_dict(state.plateau)
    carried = storage.load_rank(checkpoint.tensors(f"rank{engine.rank}.safetensors"), engine.device)
    return state, carried, recorded.get("metrics")


def replacement_of_best(
    run: Run, newest: Checkpoint, identity: str, model: nn.Module, say: Callable[[str], None]
) -> tuple[float, int, str] | None:
    """The replacement of a damaged best checkpoint, with --repair: quality and step of the best intact one, evaluated again, and a word for
    what was lost. None if the best checkpoint is intact. Changes the weights of the model.

    Without --repair Damaged if an earlier checkpoint that the final test will read is not intact.
    """
    root, step = newest.folder.parent, newest.json(STATE, Stored)["best_step"]

    def is_intact(step: int, otherwise: str) -> bool:
        try:
            verify(root / name_of(step), identity, REPAIR)
            return True
        except Damaged as error:
            if not run.flags.repair:
                raise
            say(f"WARNING: {error.path} {error.fault}; {otherwise}")
            return False

    if not run.selects_best:
        return None
    if moe_layers(model) and 0 < (before := validation_before_the_end(run.flags)) < newest.step:
        is_intact(before, f"how routing has changed since step {before} is not measured")
    if not step or is_intact(step, "the best intact checkpoint is tested instead"):
        return None
    found = {}
    for other in steps(root):
        with suppress(Damaged):
            load_step(model, root, other, identity)
            found[other] = badness(run, model)
    chosen = min(found, key=found.get)
    return found[chosen], chosen, f"the best checkpoint, of step {step}"


def badness(run: Run, model: nn.Module) -> float:
    """The quality on validation at the last k of training, as a number of which less is better."""
    task, flags = run.task, run.flags
    quality = evaluate(task, model, task.splits[0], last_top_k(flags), flags.max_eval_steps)[task.metric.name]
    return quality if task.metric.lower_is_better else -quality


def load_step(
    model: nn.Module, root: Path, step: int, identity: str, remedy: str = REPAIR, weights_sha256: str | None = None
) -> Checkpoint:
    """Loads the weights of a step, verified, and returns its checkpoint."""
    checkpoint = Checkpoint(root / name_of(step), identity, remedy, weights_sha256)
    checkpoint.load_weights(model)
    return checkpoint
