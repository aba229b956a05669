"""Makes a trained mixture-of-experts model smaller: drops, merges or compresses experts, and measures the model before and after.

    python surgery.py --from runs/laptop/enwik8/smoe-seed1 --method merge --keep 8
    python surgery.py --from RUN --method uncurl --keep 8 --task sst2        calibrated on the task; then finetune.py --checkpoint OUT
    python surgery.py --from RUN --method compress --rank 32 --kept 0.1      then train.py --start_from OUT --teacher RUN

The folder it writes can be given wherever a finished run can: train.py --start_from and --eval_only, finetune.py, generate.py.
`python surgery.py --help` lists the flags.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before exit_on_user_error handles signals

from utils.errors import exit_on_user_error

if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported, so that a wrong flag or text is refused at once
        from utils.cli.surgery import parse

        PLAN = parse()

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from smoe_dropout import calibrate, moe_layers, operate
from smoe_dropout.manifest import sha256
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import SURGERIES, load
from smoe_dropout.surgery.compression import compress
from utils import documents
from utils.checkpoints.manifest import name_of
from utils.checkpoints.run_files import CALIBRATION, SURGERY
from utils.checkpoints.storage import Checkpoint, require_space
from utils.checkpoints.weights import store
from utils.cli.surgery import Plan, flags_after, is_complete
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.derive import evaluation_ks
from utils.flags.fields import COMPRESS, SurgeryFlags
from utils.formatting import short_number
from utils.models.flops import parameter_counts
from utils.models.registry import architecture
from utils.tasks.base import Task
from utils.tasks.labelled import LabelledTask
from utils.training.evaluation import chained, evaluate_all, time_ratios
from utils.training.run_folder import RunFolder, describe_environment
from utils.training.setup import finetuning_task, pretraining_run, pretraining_task

Pass = tuple[Callable[[], None], Tensor | None]  # runs the model once; mask of the positions [N, T] that count, None for all


def main(plan: Plan, engine: Engine) -> int:
    flags, source = plan.flags, plan.source
    if is_complete(plan):
        print(f"this operation is complete: {flags.out}")
        return 0
    run = pretraining_run(plan.made, plan.text, engine, source)
    model = run.build().to(engine.device).eval()
    print(f"{flags.method}: {source.path} ({source.summary})")
    try:
        if flags.method == COMPRESS:
            calibration, smaller = None, compress(model, flags.rank)
        else:
            calibration = read(plan, model, engine) if plan.material is not None else None
            seed = {"seed": flags.seed} if "seed" in load(SURGERIES, "method", flags.method).OPTIONS else {}
            smaller, _ = operate(model, flags.method, flags.keep, calibration, **plan.options, **seed)
    except (ConfigError, ValueError) as error:
        raise UserError(str(error)) from None

    after = flags_after(plan, tuple(layer.num_experts for _, layer in moe_layers(smaller)))
    checkpoints = RunFolder.checkpoints_of(after)
    require_space(checkpoints, list(smaller.state_dict().values()), copies=1, flag="--out")
    folder = RunFolder(after, run.fingerprints() | {"surgery": plan.provenance}, "--out")
    store(smaller, checkpoints, folder.config_sha256)
    hashes = {"config_sha256": folder.config_sha256}
    if calibration is not None:
        calibration.save(folder.path / CALIBRATION)
        hashes["calibration_sha256"] = sha256(folder.path / CALIBRATION)

    run_after = pretraining_run(after, plan.text, engine)
    smaller = Checkpoint(checkpoints / name_of(0), folder.config_sha256).load_weights(run_after.build())  # measure what was saved
    pairs = [(run.task, engine.prepare(model)), (run_after.task, engine.prepare(smaller))]
    surgery = plan.provenance | {"metric": metric_of(run.task)}
    surgery |= {"before": plan.earlier.get("before") or measured("before", *pairs[0], print), "after": measured("after", *pairs[1], print)}
    surgery |= {"time": chained(plan.earlier, time_ratios(*pairs)), "environment": describe_environment(engine)}
    documents.write(folder.path / SURGERY, surgery | hashes)
    print(as_text(surgery))
    print(f"done: {folder.path}")
    return 0


def read(plan: Plan, model: nn.Module, engine: Engine):
    """Collects usage, gate weights and router logits of the experts on a text, or on the rows of a task."""
    if plan.rows is None:
        passes = text_passes(pretraining_task(plan.made, plan.material, engine), model, plan.flags)
    else:
        passes = row_passes(finetuning_task(plan.rows, plan.material, engine, plan.source), model, plan.flags)
    return calibrate(model, passes, k=plan.flags.k, seed=plan.flags.seed)


def text_passes(task: Task, model: nn.Module, flags: SurgeryFlags) -> Iterator[Pass]:
    """Yields a forward pass over each training batch of a text, in order, until --examples or --tokens are read."""
    state, read = None, 0
    while read < (flags.tokens or flags.examples):
        batch = task.next()

        def run(batch=batch) -> None:
            nonlocal state
            with task.engine.autocast():
                _, state, _ = model(*batch.inputs, None if batch.first else state)

        yield run, None
        read += batch.inputs[0].numel() if flags.tokens else len(batch.inputs[0])


def row_passes(task: LabelledTask, model: nn.Module, flags: SurgeryFlags) -> Iterator[Pass]:
    """Yields forward passes over the rows of a fine-tuning task, without its head; padding does not count."""
    read = 0
    while read < (flags.tokens or flags.examples):
        batch = task.next()
        tokens_NT, lengths_N = task.sequences_of(batch)

        def run(tokens_NT=tokens_NT, lengths_N=lengths_N) -> None:
            with task.engine.autocast():
                architecture(task.flags.model).hidden_states(model, tokens_NT, lengths_N)

        real_NT = torch.arange(tokens_NT.shape[1], device=tokens_NT.device) < lengths_N[:, None]
        yield run, real_NT
        read += int(real_NT.sum()) if flags.tokens else len(batch.inputs[0])


def metric_of(task: Task) -> dict:
    return {"name": task.metric.name, "lower_is_better": task.metric.lower_is_better, "split": task.splits[-1]}


def measured(when: str, task: Task, model: nn.Module, say: Callable[[str], None]) -> dict[str, Any]:
    """Numbers of experts in each layer, parameters, and the quality at every k on the split shown in tables."""
    say(f"{when}:")
    sizes = [layer.num_experts for _, layer in moe_layers(model)]
    quality = evaluate_all(task, model, task.splits[-1:], evaluation_ks(task.flags), say)
    return {"experts": sizes, "parameters": parameter_counts(model)["total"], "quality": quality}


def as_text(surgery: dict[str, Any]) -> str:
    """The before/after table printed by surgery.py."""
    before, after, metric = surgery["before"], surgery["after"], surgery["metric"]
    lines = [f"{'k':>4}  {metric['split'] + ' ' + metric['name']:>20}  {'activated parameters':>20}  {'FLOPs a token':>20}"]
    rows = [{row["k"]: row for row in part["quality"]} for part in (before, after)]
    forms = {metric["split"]: "{:.4f}".format, "active_parameters": short_number, "flops_per_token": short_number}
    for k in sorted(rows[0].keys() | rows[1].keys()):
        cells = [" -> ".join(form(part[k][name]) if k in part else "none" for part in rows) for name, form in forms.items()]
        lines.append(f"{k:>4}" + "".join(f"  {cell:>20}" for cell in cells))
    lines.append(f"experts of each layer: {' -> '.join(str(part['experts']) for part in (before, after))}")
    lines.append(f"parameters: {before['parameters']:,} -> {after['parameters']:,}")
    lines += [f"pass time, k = {one['k'][0]} -> k = {one['k'][1]}: x {one['ratio']:.2f}" for one in surgery["time"]]
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_on_user_error(), Engine(PLAN.made) as ENGINE:
        sys.exit(main(PLAN, ENGINE))
