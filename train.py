"""Pre-trains a Transformer-XL, BERT or RoBERTa, dense or with experts, and tests it at every number of active experts.

    python train.py --preset laptop --method smoe_dropout --data data/enwik8
    python train.py --preset laptop --method smoe_dropout --model bert --data data/books-bert
    torchrun --nproc_per_node 2 train.py ...        accelerate launch train.py ...
    python train.py --start_from DIR --max_step 500        from the weights of a run, or of surgery.py
    python train.py --eval_only --k 1,2,4 --work_dir DIR

Starting the same command again resumes the run in its --work_dir. `python train.py --help` lists the flags.
"""

import sys

from utils.cli.train import parse
from utils.data.corpus import Corpus
from utils.errors import exit_on_user_error
from utils.flags.derive import evaluation_ks, last_top_k, method_of, parse_ks, top_k_schedule
from utils.flags.fields import Flags
from utils.flags.models import MODELS

if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported, so that a wrong flag is refused at once
        FLAGS, SOURCE = parse()
        CORPUS = Corpus.open(FLAGS.data, MODELS[FLAGS.model].reads)
        CORPUS.verify()

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from smoe_dropout import auxiliary_loss, expert_load, method_metrics, moe_layers, set_progress, set_top_k
from smoe_dropout.control import auxiliary_losses
from smoe_dropout.hosts import find_sites
from smoe_dropout.io import load_weights, save_model
from smoe_dropout.methods.base import Forward, cross_entropy
from utils.checkpoints import storage
from utils.engine import Engine
from utils.errors import TrainingError, UserError
from utils.models.build import forget_router_gradients, training_settings
from utils.models.flops import parameter_counts
from utils.tasks.base import Batch, Task
from utils.tasks.base import State as Carried
from utils.training.averaging import WeightAverage
from utils.training.evaluation import evaluate, evaluate_all
from utils.training.interrupt import Interrupt
from utils.training.optimizer import Plateau, build_optimizer, learning_rate
from utils.training.probe import refuse_if_too_slow
from utils.training.progress import Progress
from utils.training.record import build_result, moe_layer_indices
from utils.training.routing import describe_routing, validation_before_the_end
from utils.training.run_folder import RunFolder, describe_environment, resume_command, write_json
from utils.training.start_from import pretraining


@dataclass
class State:
    """Where a run stands, besides weights, optimiser, what the model carries on and random generators."""

    step: int = 0
    loss_sum: float = 0.0  # nats since the last log line, of this process's tokens
    loss_tokens: int = 0
    best: float = float("inf")  # the smaller the better: of a metric that grows with quality, its negative
    best_step: int = 0
    seconds: float = 0.0  # wall time of training steps, validations left out
    cpu_seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    data: dict = field(default_factory=dict)
    plateau: dict = field(default_factory=dict)
    world_size: int = 1


def main(task: Task) -> int:
    flags, engine = task.flags, task.engine
    say = print if engine.is_main else (lambda sentence: None)

    checkpoints = RunFolder.checkpoints_of(flags)
    if not flags.yes and not storage.steps(checkpoints):
        refuse_if_too_slow(task)
    torch.manual_seed(flags.seed)  # the same on every process: the same initial weights and router
    model = task.build()  # before anything is written: what it starts from may not fit
    folder = RunFolder(flags, task.fingerprints) if engine.is_main else None
    newest = storage.latest(checkpoints, say)
    if (checkpoints.parent / "result.json").exists():
        say(f"this run is complete: {checkpoints.parent / 'result.json'}")
        return 0

    model = engine.prepare(model)
    task.begin(model)
    optimizer = build_optimizer(model, flags)
    method = method_of(flags)
    objective = partial(method.objective if method else cross_entropy, settings=training_settings(flags, len(task.corpus.train)))
    objective = task.objective(objective)
    schedule, plateau = top_k_schedule(flags), Plateau(flags)
    average = WeightAverage(model, flags.swad_start, flags.swad_end) if flags.swad else None
    # weights and Adam's two moments, in four checkpoints kept and one in the making; with --swad the mean besides
    storage.require_space(checkpoints, list(model.state_dict().values()), copies=(3 + bool(average)) * 5)

    state, carried = State(world_size=engine.world_size), None
    if newest is not None:
        state, carried = restore(newest, task, model, optimizer, plateau, average)
    else:
        torch.manual_seed(flags.seed + engine.rank)  # dropout differs between processes
    if engine.is_main:
        folder.truncate_metrics(state.step)
        folder.write_environment(engine, sys.argv)
    describe(task, model, state, say)

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

        loss_sum, carried, flops = accumulate_gradients(task, model, objective, batch, carried)
        if 0 <= flags.dynamic_router_start <= step:
            forget_router_gradients(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.clip)
        if not torch.isfinite(norm):
            raise TrainingError(not_finite(step, lr, norm, loss_sum / batch.targets, checkpoints))
        optimizer.step()
        task.after_update()
        optimizer.zero_grad()
        if average:
            average.observe(model, step + 1)

        state.step, state.data = step + 1, task.state_dict()
        state.loss_sum += loss_sum
        state.loss_tokens += batch.targets
        state.tokens += batch.shape.rows * batch.shape.positions
        state.flops += 3 * flops  # the backward pass does twice the forward's work
        state.seconds += time.perf_counter() - begin
        state.cpu_seconds += time.process_time() - cpu_begin

        last = state.step == flags.max_step
        log_due, eval_due = (last or state.step % interval == 0 for interval in (flags.log_interval, flags.eval_interval))
        stop = engine.any(interrupt.signal)
        save_due = eval_due or stop or (flags.save_interval and state.step % flags.save_interval == 0)
        at_k = "" if k is None else f" | k {k}"
        if log_due:
            quality = log(task, folder, model, state, lr, k, float(norm))
            progress.update(state.step, f"{quality} | lr {lr:.2e}{at_k}", keep=True)
        else:
            progress.update(state.step, f"loss {loss_sum / batch.targets:.4f} | lr {lr:.2e}{at_k}", keep=False)
        if eval_due:
            paused = time.perf_counter()
            validate(task, folder, model, k, state, plateau, average, progress.say)
            progress.paused += time.perf_counter() - paused
        if save_due:
            try:
                save(checkpoints, task, model, optimizer, carried, state, plateau, average, keep=validation_before_the_end(flags))
            except (OSError, SafetensorError) as error:
                raise TrainingError(
                    f"step {state.step} cannot be saved in {checkpoints}: {error}; mend that and start the same command again"
                ) from None
        if stop:
            progress.say(f"stopped at step {state.step}, saved in {checkpoints}; to go on: {resume_command(engine.world_size)}")
            return 128 + stop

    interrupt.at_once()  # everything is saved
    finish(task, folder, model, checkpoints, state, average, progress.say)
    return 0


def finish(task: Task, folder: RunFolder | None, model, checkpoints, state: State, average, say) -> None:
    """The final test at every k, and the record."""
    flags, engine = task.flags, task.engine
    ks, splits = evaluation_ks(flags), task.splits
    training = {"steps": state.step, "tokens": state.tokens, "seconds": state.seconds, "cpu_seconds": state.cpu_seconds}
    training |= {"tokens_per_second": state.tokens / state.seconds, "flops": state.flops}
    if average and average.count:
        say(f"final test of the mean of the weights after {average.count} steps")
        with average.applied(model):
            quality = evaluate_all(task, model, splits, ks, say)
        training["averaged"] = {"from": average.start, "to": average.end, "steps": average.count, "quality": quality}
    routing = describe_routing(task, model, checkpoints) if task.selects else None
    chosen = state.best_step if task.selects else state.step
    load_step(model, checkpoints, chosen)
    model = task.finished(model)
    why = f"the best on validation{f' at k = {last_top_k(flags)}' if flags.moe else ''}" if task.selects else "the last"
    say(f"final test of step {chosen}, {why}")
    quality = evaluate_all(task, model, splits, ks, say)
    if folder is None:
        return
    metrics = folder.metrics()
    last = next(line for line in reversed(metrics) if line["split"] == "train")
    training["method_metrics"] = {name: value for name, value in last.items() if "." in name}  # those named after modules
    measured = (quality, training, routing, metrics, describe_environment(engine), engine.peak_memory_mib(), chosen)
    write_json(folder.path / "result.json", build_result(task, model, *measured, sys.argv[1:]))
    folder.close()
    say(f"done: {folder.path / 'result.json'}")


class Gradients(NamedTuple):
    """What one step's gradients came from: this process's summed loss in nats, what its rows carry on, and the operations of all forward
    passes over the global batch.
    """

    loss_sum: float
    carried: Carried
    flops: int


def accumulate_gradients(task: Task, model, objective, batch: Batch, carried: Carried) -> Gradients:
    """Gradients of the mean over all targets of the global batch, computed in `batch_chunk` parts."""
    engine, shape = task.engine, batch.shape
    chunks = min(task.flags.batch_chunk, shape.rows // engine.world_size)  # the same on every process
    states = list(zip(*(tensor.tensor_split(chunks) for tensor in carried), strict=True)) if carried else [None] * chunks
    parts = zip(*(tensor.tensor_split(chunks) for tensor in batch.inputs), strict=True)
    whole = shape._replace(remembered=carried[0].shape[1] if carried else 0)
    loss_sum, new_states, flops = 0.0, [], 0.0
    for index, (inputs, state) in enumerate(zip(parts, states, strict=True)):
        rows, own = len(inputs[0]), len(batch.inputs[0])

        def forward(arguments=(*inputs, state), share=rows / own) -> Forward:
            nonlocal flops
            passed = Forward(*engine.forward(*arguments))
            flops += share * task.forward_flops(model, whole, None)
            return passed

        with nullcontext() if index == chunks - 1 else engine.no_sync():
            part = objective(model, forward)
            # data parallelism takes the mean over processes, whatever their numbers of rows: hence the world size
            (part.total * (rows * engine.world_size / shape.rows)).backward()
        loss_sum += part.nll.item() * rows * shape.targets
        new_states.append(part.state)
    joined = tuple(torch.cat(tensors) for tensors in zip(*new_states, strict=True)) if new_states[0] else None
    return Gradients(loss_sum, joined, round(flops))


def log(task: Task, folder: RunFolder | None, model, state: State, lr: float, k: int | None, norm: float) -> str:
    """One line of the training log: mean loss since the line before it, over all processes. Returns it in words."""
    sums = [state.loss_sum, state.loss_tokens, auxiliary_loss(model).item() * state.loss_tokens]
    loss_sum, tokens, auxiliary_sum = task.engine.sum(sums)
    loss, metric = loss_sum / tokens, task.metric
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


def validate(task: Task, folder: RunFolder | None, model, k: int | None, state: State, plateau: Plateau, average, say) -> None:
    """Quality at the current k, E/2, E and the k that training ends at, by which the best is chosen; that of mean weights, too."""
    flags, metric = task.flags, task.metric.name
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
    best = task.selects and badness < state.best
    if best:
        state.best, state.best_step = badness, state.step
    values = ", ".join(f"{value:.4f}" + ("" if at is None else f" at k = {at}") for at, value in found.items())
    say(f"{'validation' if task.selects else task.splits[0]} at step {state.step}: {values} {metric}{', the best so far' if best else ''}")


def save(
    root, task: Task, model, optimizer, carried: Carried, state: State, plateau: Plateau, average: WeightAverage | None, keep: int
) -> None:
    """One whole checkpoint by all processes; the last two, the best and the one to keep stay."""
    engine = task.engine
    state.plateau = plateau.state_dict()
    writer = storage.Writer(root, state.step, engine.is_main)
    engine.barrier()
    writer.add(f"rank{engine.rank}.safetensors", storage.rank_tensors(carried, engine.device))
    writer.add_json(f"rank{engine.rank}.json", {"loss_sum": state.loss_sum, "loss_tokens": state.loss_tokens})
    engine.barrier()
    if engine.is_main:
        save_model(model, writer.partial)
        writer.add("optimizer.safetensors", storage.optimizer_tensors(optimizer))
        if average:
            writer.add("average.safetensors", average.state())
        if tensors := task.tensors():
            writer.add("task.safetensors", tensors)
        writer.add_json("state.json", asdict(state))
        writer.finish()
        storage.prune(root, keep={state.best_step, keep})
    engine.barrier()


def restore(folder, task: Task, model, optimizer, plateau: Plateau, average: WeightAverage | None) -> tuple[State, Carried]:
    """Everything as it was when the checkpoint was made. UserError for another number of processes."""
    engine = task.engine
    stored = storage.read_json(folder / "state.json")
    if stored.keys() != {entry.name for entry in fields(State)}:
        raise UserError(f"{folder} was made by another version of this program: choose another --work_dir")
    state = State(**stored)
    if state.world_size != engine.world_size:
        raise UserError(f"{folder} was made by {state.world_size} processes, and this run has {engine.world_size}: start as many")
    state = replace(state, **storage.read_json(folder / f"rank{engine.rank}.json"))
    load_weights(model, folder)
    storage.load_optimizer(optimizer, folder / "optimizer.safetensors")
    if average:
        average.load_state(load_file(folder / "average.safetensors"))
    if task.tensors():
        task.load_tensors(load_file(folder / "task.safetensors"))
    task.load_state_dict(state.data)
    plateau.load_state_dict(state.plateau)
    return state, storage.load_rank(folder / f"rank{engine.rank}.safetensors", engine.device)


def load_step(model, checkpoints, step: int) -> None:
    folder = checkpoints / storage.name_of(step)
    storage.verify(folder)
    load_weights(model, folder)


def describe(task: Task, model, state: State, say) -> None:
    """What is about to be run, in a few lines."""
    flags, engine, counts = task.flags, task.engine, parameter_counts(model)
    say(f"{flags.method or 'custom'} on {task.corpus.title}: {counts['total']:,} parameters, {counts['trainable']:,} trained")
    say(f"work_dir: {flags.work_dir}")
    for sentence in task.describe():
        say(sentence)
    if flags.moe:
        indices = moe_layer_indices(flags)
        dense = [index for index in range(flags.n_layer) if index not in indices]
        rest = f"; layers {dense} stay dense, {find_sites(model)[0].d_ff} wide" if dense else ""
        say(f"experts: {flags.moe_num_expert} x {flags.d_inner} in layers {indices}{rest}")
        if flags.attn_moe:
            say(f"queries, keys and values: top-1 experts in layers {indices}")
        trained = [parameter.requires_grad for _, layer in moe_layers(model) for parameter in layer.routing_parameters()]
        state_of_router = ("trained" if any(trained) else "frozen") if trained else "without parameters"
        say(f"router: {flags.gate_name}, {state_of_router}; k: {top_k_schedule(flags)}")
        if flags.dynamic_moe and flags.moe_top_k != max(1, flags.moe_num_expert // 2):
            say(f"note: --moe_top_k {flags.moe_top_k} has no effect, k follows the schedule")
        say(f"computed by: {computed_by(flags, model)}")
    name = f"{engine.device.type} ({engine.device_name})"
    say(f"{flags.precision} on {name}, {engine.world_size} process(es), {torch.get_num_threads()} thread(s) each; {flags.max_step} steps")
    if state.step:
        say(f"resumed at step {state.step}")


def computed_by(flags: Flags, model) -> str:
    """Which way the experts are computed at the schedule's smallest and largest k."""
    schedule, tokens = top_k_schedule(flags), flags.batch_size * flags.tgt_len // flags.batch_chunk
    dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32
    experts = moe_layers(model)[0][1].experts
    ways = {k: experts.backend_for(tokens, k, dtype) for k in sorted({schedule.k_min, schedule.k_max})}
    return ", ".join(f"{way} at k = {k}" for k, way in ways.items()) + (" (auto)" if flags.expert_backend == "auto" else "")


def not_finite(step, lr, norm, loss, checkpoints) -> str:
    last = storage.steps(checkpoints)
    return (
        f"loss or gradient is not finite at step {step}: loss {loss:.4g}, gradient norm {float(norm):.4g}, "
        f"lr {lr:.3g}; the step was not taken; last good checkpoint: {checkpoints / storage.name_of(last[-1]) if last else 'none'}; "
        f"try a smaller --lr or --clip, or --precision fp32, in a new --work_dir"
    )


def evaluate_run(task: Task) -> int:
    """--eval_only: the weights of a run that its table shows, at the given k, into eval.json beside result.json."""
    flags, engine, root = task.flags, task.engine, RunFolder.checkpoints_of(task.flags)
    newest = storage.latest(root, print)
    if newest is None:
        raise UserError(f"{root} holds no checkpoint: train first")
    model = task.build()
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
        TASK = pretraining(FLAGS, CORPUS, ENGINE, SOURCE)
        sys.exit((evaluate_run if FLAGS.eval_only else main)(TASK))
