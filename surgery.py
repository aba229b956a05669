"""Makes a trained mixture-of-experts model smaller: drops, merges or compresses experts, and measures the model before and after.

    python surgery.py --from runs/laptop/enwik8/smoe-seed1 --method merge --keep 8
    python surgery.py --from RUN --method uncurl --keep 8 --task sst2        calibrated on the task; then finetune.py --checkpoint OUT
    python surgery.py --from RUN --method compress --rank 32 --kept 0.1      then train.py --start_from OUT --teacher RUN

The folder it writes can be given wherever a finished run can: train.py --start_from and --eval_only, finetune.py, generate.py.
`python surgery.py --help` lists the flags.
"""

import sys

from utils.cli.surgery import parse
from utils.errors import exit_on_user_error

if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported, so that a wrong flag or text is refused at once
        PLAN = parse()

from torch import nn

from smoe_dropout import calibrate, moe_layers, operate
from smoe_dropout.io import load_weights
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import SURGERIES, load
from smoe_dropout.surgery.compression import compress
from utils.checkpoints.origin import SURGERY
from utils.checkpoints.storage import name_of
from utils.checkpoints.weights import store
from utils.cli.surgery import Plan, flags_after, is_complete
from utils.engine import Engine
from utils.errors import UserError
from utils.flags.fields import COMPRESS
from utils.tasks.base import Task
from utils.training.run_folder import RunFolder, describe_environment, write_json
from utils.training.setup import finetuning_task, pretraining_run, pretraining_task
from utils.training.surgery_measure import as_text, chained, measured, row_passes, text_passes, time_ratios


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
    folder = RunFolder(after, run.fingerprints() | {"surgery": plan.provenance})
    checkpoints = folder.checkpoints_of(after)
    store(smaller, checkpoints)
    if calibration is not None:
        calibration.save(folder.path / "calibration.safetensors")

    run_after = pretraining_run(after, plan.text, engine)
    smaller = load_weights(run_after.build(), checkpoints / name_of(0))  # measure what was saved
    pairs = [(run.task, engine.prepare(model)), (run_after.task, engine.prepare(smaller))]
    surgery = plan.provenance | {"metric": metric_of(run.task)}
    surgery |= {"before": plan.earlier.get("before") or measured("before", *pairs[0], print), "after": measured("after", *pairs[1], print)}
    surgery |= {"time": chained(plan.earlier, time_ratios(*pairs)), "environment": describe_environment(engine)}
    write_json(folder.path / SURGERY, surgery)
    print(as_text(surgery))
    print(f"done: {folder.path}")
    return 0


def read(plan: Plan, model: nn.Module, engine: Engine):
    """Collects usage, gate weights and router logits of the experts on a text, or on the rows of a task."""
    if plan.rows is None:
        passes = text_passes(pretraining_task(plan.made, plan.material, engine), model, plan.flags.tokens)
    else:
        passes = row_passes(finetuning_task(plan.rows, plan.material, engine, plan.source), model, plan.flags.tokens)
    return calibrate(model, passes, k=plan.flags.k, seed=plan.flags.seed)


def metric_of(task: Task) -> dict:
    return {"name": task.metric.name, "lower_is_better": task.metric.lower_is_better, "split": task.splits[-1]}


if __name__ == "__main__":
    with exit_on_user_error(), Engine(PLAN.made) as ENGINE:
        sys.exit(main(PLAN, ENGINE))
