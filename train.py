"""Pre-trains a Transformer-XL, BERT or RoBERTa, dense or with experts, and tests it at every number of active experts.

    python train.py --preset laptop --method smoe_dropout --data data/enwik8
    python train.py --preset laptop --method smoe_dropout --model bert --data data/books-bert
    torchrun --nproc_per_node 2 train.py ...        accelerate launch train.py ...
    python train.py --start_from DIR --max_step 500        from the weights of a finished run, or of surgery.py
    python train.py --eval_only --k 1,2,4 --work_dir DIR

Rerun the same command to resume the run in its --work_dir. `python train.py --help` lists the flags.
"""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before exit_on_user_error handles signals

from utils.errors import exit_on_user_error
from utils.flags.derive import evaluation_ks, last_top_k, parse_ks, top_k_schedule
from utils.flags.models import MODELS

if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported, so that a wrong flag is refused at once
        from utils.cli.pipeline import refuse_other_data
        from utils.cli.train import parse, refuse_sizes
        from utils.data.corpus import Corpus

        FLAGS, SOURCE = parse()
        CORPUS = Corpus.open(FLAGS.data, MODELS[FLAGS.model].reads)
        refuse_other_data(FLAGS, CORPUS)
        refuse_sizes(FLAGS, CORPUS)
        CORPUS.verify()

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from smoe_dropout import auxiliary_loss, expert_load, method_metrics, set_progress, set_top_k
from smoe_dropout.control import auxiliary_losses
from smoe_dropout.io import load_weights, save_model
from smoe_dropout.methods.base import Forward
from utils.checkpoints import storage
from utils.engine import Engine
from utils.errors import TrainingError, UserError
from utils.models.build import forget_router_gradients
from utils.models.flops import forward_flops
from utils.tasks.base import Batch
from utils.tasks.base import State as Carried
from utils.training.averaging import WeightAverage
from utils.training.describe import describe
from utils.training.evaluation import evaluate, evaluate_all
from utils.training.interrupt import Interrupt
from utils.training.optimizer import Plateau, build_optimizer, learning_rate
from utils.training.probe import refuse_if_too_slow
from utils.training.progress import Progress
from utils.training.record import build_result
from utils.training.routing import describe_routing, validation_before_the_end
from utils.training.run import Run
from utils.training.run_folder import RunFolder, describe_environment, resume_command, write_json
from utils.training.setup import pretraining_run


@dataclass
class State:
    """Progress of a run, besides weights, optimiser, the model's carried state and random generators."""

    step: int = 0
    loss_sum: float = 0.0  # nats since the last log line, over this process's tokens
    loss_tokens: int = 0
    best: float = float("inf")  # lower is better: negated for a metric that grows with quality
    best_step: int = 0
    seconds: float = 0.0  # wall time of training steps, without validations
    cpu_seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    data: dict = field(default_factory=dict)
    plateau: dict = field(default_factory=dict)
    world_size: int = 1


def main(run: Run) -> int:
    flags, engine, task = run.flags, run.engine, run.task
    say = print if engine.is_main else (lambda sentence: None)

    checkpoints = RunFolder.checkpoints_of(flags)
    if not flags.yes and not storage.steps(checkpoints):
        refuse_if_too_slow(run)
    torch.manual_seed(flags.seed)  # the same on every process, for the same initial weights and router
    model = run.build()  # before anything is written: the checkpoint it starts from may not fit
    folder = RunFolder(flags, run.fingerprints()) if engine.is_main else None
    newest = storage.latest(checkpoints, say)
    if (checkpoints.parent / "result.json").exists():
        say(f"this run is complete: {checkpoints.parent / 'result.json'}")
        return 0

    model = engine.prepare(model)
    for callback in run.callbacks:
        callback.begin(model)
    optimizer, objective = build_optimizer(model, flags), run.objective()
    schedule, plateau = top_k_schedule(flags), Plateau(flags)
    average = WeightAverage(model, flags.swad_start, flags.swad_end) if flags.swad else None
    # weights and Adam's two moments, in four stored checkpoints and one being written; with --swad also the mean
    storage.require_space(checkpoints, list(model.state_dict().values()), copies=(3 + bool(average)) * 5)

    state, carried = State(world_size=engine.world_size), None
    if newest is not None:
        state, carried = restore(newest, run, model, optimizer, plateau, average)
    else:
        torch.manual_seed(flags.seed + engine.rank)  # dropout differs between processes
    if engine.is_main:
        folder.truncate_metrics(state.step)
        folder.write_environment(engine, sys.argv)
    for line in describe(run, model):
        say(line)
    if state.step:
        say(f"resumed at step {state.step}")

    interrupt, progress = Interrupt(), Progress(state.step, flags.max_step, engine.is_main)
    model.train()
    for step in range(state.step, flags.max_step):
        begin, cpu_begin = time.perf_counter(), time.process_time()
        k = schedule(step) if schedule else None
        if k is not None:
            set_top_k(model, k)
        set_progress(model, step, flags.max_step)
        lr = learning_rate(flags, step, plateau.factor)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = task.next()
        if batch.first:
            carried = None

        loss_sum, carried, flops = accumulate_gradients(run, model, objective, batch, carried)
        if 0 <= flags.dynamic_router_start <= step:
            forget_router_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.clip)
        if not torch.isfinite(norm):
            raise TrainingError(not_finite(step, lr, norm, loss_sum / batch.targets, checkpoints))
        optimizer.step()
        for callback in run.callbacks:
            callback.after_update()
        optimizer.zero_grad()
        if average:
            average.observe(model, step + 1)

        state.step, state.data = step + 1, task.state_dict()
        state.loss_sum += loss_sum
        state.loss_tokens += batch.targets
        state.tokens += batch.shape.rows * batch.shape.positions
        state.flops += 3 * flops  # the backward pass takes twice the operations of the forward pass
        state.seconds += time.perf_counter() - begin
        state.cpu_seconds += time.process_time() - cpu_begin

        last = state.step == flags.max_step
        log_due, eval_due = (last or state.step % interval == 0 for interval in (flags.log_interval, flags.eval_interval))
        stop = engine.any(interrupt.signal)
        save_due = eval_due or stop or (flags.save_interval and state.step % flags.save_interval == 0)
        at_k = "" if k is None else f" | k {k}"
        if log_due:
            quality = log(run, folder, model, state, lr, k, float(norm))
            progress.update(state.step, f"{quality} | lr {lr:.2e}{at_k}", keep=True)
        else:
            progress.update(state.step, f"loss {loss_sum / batch.targets:.4f} | lr {lr:.2e}{at_k}", keep=False)
        if eval_due:
            paused = time.perf_counter()
            validate(run, folder, model, k, state, plateau, average, progress.say)
            progress.paused += time.perf_counter() - paused
        if save_due:
            try:
                save(checkpoints, run, model, optimizer, carried, state, plateau, average, keep=validation_before_the_end(flags))
            except (OSError, SafetensorError) as error:
                raise TrainingError(
                    f"step {state.step} cannot be saved in {checkpoints}: {error}; fix that and rerun the same command to resume"
                ) from None
        if stop:
            progress.say(f"stopped at step {state.step}, saved in {checkpoints}; to resume: {resume_command(engine.world_size)}")
            return 128 + stop

    interrupt.at_once()  # everything is saved
    finish(run, folder, model, checkpoints, state, average, progress.say)
    return 0


def finish(run: Run, folder: RunFolder | None, model, checkpoints, state: State, average, say) -> None:
    """Runs the final test at every k and writes the record."""
    flags, engine, task = run.flags, run.engine, run.task
    ks, splits = evaluation_ks(flags), task.splits
    training = {"steps": state.step, "tokens": state.tokens, "seconds": state.seconds, "cpu_seconds": state.cpu_seconds}
    training |= {"tokens_per_second": state.tokens / state.seconds, "flops": state.flops}
    if average and average.count:
        say(f"final test of the weights averaged over {average.count} steps")
        with average.applied(model):
            quality = evaluate_all(task, model, splits, ks, say)
        training["averaged"] = {"from": average.start, "to": average.end, "steps": average.count, "quality": quality}
    routing = describe_routing(task, model, checkpoints) if run.selects_best else None
    chosen = state.best_step if run.selects_best else state.step
    load_step(model, checkpoints, chosen)
    for callback in run.callbacks:
        model = callback.finished(run, model)
    why = f"the best on validation{f' at k = {last_top_k(flags)}' if flags.moe else ''}" if run.selects_best else "the last"
    say(f"final test of step {chosen}, {why}")
    quality = evaluate_all(task, model, splits, ks, say)
    if folder is None:
        return
    metrics = folder.metrics()
    last = next(line for line in reversed(metrics) if line["split"] == "train")
    training["method_metrics"] = {name: value for name, value in last.items() if "." in name}  # metrics named after modules
    measured = (quality, training, routing, metrics, describe_environment(engine), engine.peak_memory_mib(), chosen)
    write_json(folder.path / "result.json", build_result(run, model, *measured, sys.argv[1:]))
    folder.close()
    say(f"done: {folder.path / 'result.json'}")


class Gradients(NamedTuple):
    """Results of one step's passes: this process's summed loss in nats, the state its rows carry on, and the operations of all forward
    passes over the global batch.
    """

    loss_sum: float
    carried: Carried
    flops: int


def accumulate_gradients(run: Run, model, objective, batch: Batch, carried: Carried) -> Gradients:
    """Accumulates the gradients of the mean over all targets of the global batch, in `batch_chunk` parts."""
    flags, engine, shape = run.flags, run.engine, batch.shape
    chunks = min(flags.batch_chunk, shape.rows // engine.world_size)  # the same on every process
    states = list(zip(*(tensor.tensor_split(chunks) for tensor in carried), strict=True)) if carried else [None] * chunks
    parts = zip(*(tensor.tensor_split(chunks) for tensor in batch.inputs), strict=True)
    whole = shape._replace(remembered=carried[0].shape[1] if carried else 0)
    loss_sum, new_states, flops = 0.0, [], 0.0
    for index, (inputs, state) in enumerate(zip(parts, states, strict=True)):
        rows, own = len(inputs[0]), len(batch.inputs[0])

        def forward(inputs=inputs, state=state, share=rows / own) -> Forward:
            nonlocal flops
            passed = run.forward(lambda inputs, state: Forward(*engine.forward(*inputs, state)), inputs, state)
            flops += share * forward_flops(flags.model, model, whole, None)
            return passed

        with nullcontext() if index == chunks - 1 else engine.no_sync():
            part = objective(model, forward)
            # data parallelism averages over processes regardless of their numbers of rows, hence the world size
            (part.total * (rows * engine.world_size / shape.rows)).backward()
        loss_sum += part.nll.item() * rows * shape.targets
        new_states.append(part.state)
    joined = tuple(torch.cat(tensors) for tensors in zip(*new_states, strict=True)) if new_states[0] else None
    return Gradients(loss_sum, joined, round(flops))


def log(run: Run, folder: RunFolder | None, model, state: State, lr: float, k: int | None, norm: float) -> str:
    """Records a line of the training log: the mean loss since the line before, over all processes. Returns it as text."""
    sums = [state.loss_sum, state.loss_tokens, auxiliary_loss(model).item() * state.loss_tokens]
    loss_sum, tokens, auxiliary_sum = run.engine.sum(sums)
    loss, metric = loss_sum / tokens, run.task.metric
    quality = {metric.name: metric.of(loss)} if metric.of_loss else {}
    line = {"step": state.step, "split": "train", "loss": loss, **quality, "lr": lr, "k": k, "grad_norm": norm}
    if auxiliary_losses(model):
        line["auxiliary_loss"] = auxiliary_sum / tokens
    line |= method_metrics(model)
    state.loss_sum, state.loss_tokens = 0.0, 0
    line |= {"tokens_per_second": state.tokens / state.seconds, "seconds": state.seconds}
    if folder is not None:
        folder.record(line)
        for name, shares in expert_load(model).items():
            folder.record_histogram(f"expert_load/{name}", shares, state.step)
    return f"loss {loss:.4f}" + "".join(f" | {value:.4f} {name}" for name, value in quality.items() if name != "loss")


def validate(run: Run, folder: RunFolder | None, model, k: int | None, state: State, plateau: Plateau, average, say) -> None:
    """Measures the quality at the current k, E/2, E and the last k of training, which decides the best step; also of averaged weights."""
    flags, task, metric = run.flags, run.task, run.task.metric.name
    E, last_k = flags.moe_num_expert, last_top_k(flags)
    ks = [None] if k is None else sorted({k, max(1, E // 2), E, last_k})

    def measure() -> dict[int | None, float]:
        return {at: evaluate(task, model, task.splits[0], at, flags.max_eval_steps)[metric] for at in ks}

    def named(found: dict[int | None, float], before: str = "") -> dict[str, float]:
        return {f"{before}{metric}" + ("" if at is None else f"_k{at}"): value for at, value in found.items()}

    found = measure()
    line = {"step": state.step, "split": task.splits[0], "k": k} | named(found)
    if average and average.count:
        with average.applied(model):
            line |= named(measure(), "averaged_")
    if folder is not None:
        folder.record(line)
    quality = found[last_k]
    if not math.isfinite(quality):
        where = f"validation at step {state.step} is not finite ({quality} {metric})"
        raise TrainingError(f"{where}: try a smaller --lr or --clip in a new --work_dir")
    badness = quality if task.metric.lower_is_better else -quality
    plateau.observe(badness)
    best = run.selects_best and badness < state.best
    if best:
        state.best, state.best_step = badness, state.step
    values = ", ".join(f"{value:.4f}" + ("" if at is None else f" at k = {at}") for at, value in found.items())
    split, best_so_far = "validation" if run.selects_best else task.splits[0], ", the best so far" if best else ""
    say(f"{split} at step {state.step}: {values} {metric}{best_so_far}")


def save(
    root, run: Run, model, optimizer, carried: Carried, state: State, plateau: Plateau, average: WeightAverage | None, keep: int
) -> None:
    """Writes a checkpoint by all processes, and deletes all but the last two, the best and the one to keep."""
    engine = run.engine
    state.plateau = plateau.state_dict()
    writer = storage.Writer(root, state.step, engine.is_main)
    engine.barrier()
    writer.add(f"rank{engine.rank}.safetensors", storage.rank_tensors(carried, engine.device))
    writer.add_json(f"rank{engine.rank}.json", {"loss_sum": state.loss_sum, "loss_tokens": state.loss_tokens})
    engine.barrier()
    if engine.is_main:
        save_model(model, writer.partial, manifest=False)  # the checkpoint has its own
        writer.add("optimizer.safetensors", storage.optimizer_tensors(optimizer))
        if average:
            writer.add("average.safetensors", average.state())
        if tensors := run.tensors():
            writer.add("task.safetensors", tensors)
        writer.add_json("state.json", asdict(state))
        writer.finish()
        storage.prune(root, keep={state.best_step, keep})
    engine.barrier()


def restore(folder, run: Run, model, optimizer, plateau: Plateau, average: WeightAverage | None) -> tuple[State, Carried]:
    """Restores everything from a checkpoint. UserError for another number of processes."""
    engine = run.engine
    stored = storage.read_json(folder / "state.json")
    if stored.keys() != {entry.name for entry in fields(State)}:
        raise UserError(f"{folder} was made by another version of this program: choose another --work_dir")
    state = State(**stored)
    if state.world_size != engine.world_size:
        raise UserError(f"{folder} was made by {state.world_size} processes, and this run has {engine.world_size}: start the same number")
    state = replace(state, **storage.read_json(folder / f"rank{engine.rank}.json"))
    load_weights(model, folder)
    storage.load_optimizer(optimizer, folder / "optimizer.safetensors")
    if average:
        average.load_state(load_file(folder / "average.safetensors"))
    if run.tensors():
        tensors = load_file(folder / "task.safetensors")
        for callback in run.callbacks:
            callback.load_tensors(tensors)
    run.task.load_state_dict(state.data | {"step": state.step})  # older runs on a text saved no step with their position
    plateau.load_state_dict(state.plateau)
    return state, storage.load_rank(folder / f"rank{engine.rank}.safetensors", engine.device)


def load_step(model, checkpoints, step: int) -> None:
    folder = checkpoints / storage.name_of(step)
    storage.verify(folder)
    load_weights(model, folder)


def not_finite(step, lr, norm, loss, checkpoints) -> str:
    last = storage.steps(checkpoints)
    return (
        f"loss or gradient is not finite at step {step}: loss {loss:.4g}, gradient norm {float(norm):.4g}, "
        f"lr {lr:.3g}; the update was not applied; last good checkpoint: {checkpoints / storage.name_of(last[-1]) if last else 'none'}; "
        f"try a smaller --lr or --clip, or --precision fp32, in a new --work_dir"
    )


def evaluate_run(run: Run) -> int:
    """--eval_only: evaluates the weights that the run's table shows, at the given k, and writes eval.json beside result.json."""
    flags, engine, task, root = run.flags, run.engine, run.task, RunFolder.checkpoints_of(run.flags)
    newest = storage.latest(root, print)
    if newest is None:
        raise UserError(f"{root} holds no checkpoint: train first")
    model = run.build()
    best_step = storage.read_json(newest / "state.json")["best_step"]
    step = best_step or storage.steps(root)[-1]
    load_step(model, root, step)
    model = engine.prepare(model)
    ks = parse_ks(flags.k, flags.moe_num_expert) if flags.k and flags.moe else evaluation_ks(flags)
    rows = evaluate_all(task, model, task.splits[-1:], ks, print if engine.is_main else lambda sentence: None)
    if engine.is_main:
        write_json(root.parent / "eval.json", {"best_step": step, "data": task.corpus.fingerprint, "quality": rows})
    return 0


if __name__ == "__main__":
    with exit_on_user_error(), Engine(FLAGS) as ENGINE:
        RUN = pretraining_run(FLAGS, CORPUS, ENGINE, SOURCE)
        sys.exit((evaluate_run if FLAGS.eval_only else main)(RUN))
