"""Pre-trains a Transformer-XL, BERT or RoBERTa, dense or with experts, or trains a model of transformers further, and tests it at every
number of active experts.

    python train.py --preset laptop --method smoe_dropout --data data/enwik8
    python train.py --preset laptop --method smoe_dropout --model bert --data data/books-bert
    torchrun --nproc_per_node 2 train.py ...        accelerate launch train.py ...
    python train.py --start_from DIR --max_step 500        from the weights of a finished run, or of surgery.py
    python train.py --model hf --start_from FOLDER --method elastic --teacher self --data data/TOKENS
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

import hashlib
import math
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError

from smoe_dropout import auxiliary_loss, expert_load, method_metrics, set_progress, set_top_k
from smoe_dropout.control import auxiliary_losses
from smoe_dropout.methods.base import Forward
from utils import documents
from utils.checkpoints import storage
from utils.checkpoints.manifest import STATE, Stored, name_of, steps
from utils.checkpoints.run_files import RESULT, SURGERY, config_sha256, read_config, read_result
from utils.documents import Damaged, note_unverified
from utils.engine import Engine
from utils.errors import TrainingError, UserError
from utils.models.build import forget_router_gradients
from utils.models.flops import forward_flops
from utils.tasks.base import Batch
from utils.tasks.base import State as Carried
from utils.training.averaging import WeightAverage
from utils.training.describe import describe, reservations
from utils.training.evaluation import evaluate, evaluate_all
from utils.training.interrupt import Interrupt
from utils.training.optimizer import Plateau, build_optimizer, learning_rate
from utils.training.probe import refuse_if_too_slow
from utils.training.progress import Progress
from utils.training.record import build_result
from utils.training.routing import describe_routing
from utils.training.run import Run
from utils.training.run_folder import RunFolder, describe_environment, resume_command
from utils.training.setup import pretraining_run
from utils.training.state import State, load_step, replacement_of_best, restore, save

EMPTY = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}  # metrics.jsonl before the first step


def main(run: Run) -> int:
    flags, engine, task = run.flags, run.engine, run.task
    say = print if engine.is_main else (lambda sentence: None)

    checkpoints = RunFolder.checkpoints_of(flags)
    if not flags.yes and not steps(checkpoints):
        refuse_if_too_slow(run)
    torch.manual_seed(flags.seed)  # the same on every process, for the same initial weights and router
    model = run.build()  # before anything is written: the checkpoint it starts from may not fit
    if not (checkpoints.parent / RESULT).exists():
        # weights and Adam's two moments, in four stored checkpoints and one being written; with --swad also the mean
        storage.require_space(checkpoints, list(model.state_dict().values()), copies=(3 + flags.swad) * 5)
    folder = engine.on_main(lambda: RunFolder(flags, run.fingerprints()))
    identity = config_sha256(read_config(checkpoints.parent, note_unverified))
    if is_complete(run, identity, say):
        return 0
    newest = storage.latest(checkpoints, say, identity)

    model = engine.prepare(model)
    for callback in run.callbacks:
        callback.begin(model)
    optimizer, objective = build_optimizer(model, flags), run.objective()
    schedule, plateau = top_k_schedule(flags), Plateau(flags)
    average = WeightAverage(model, flags.swad_start, flags.swad_end) if flags.swad else None

    state, carried, recorded = State(world_size=engine.world_size), None, EMPTY
    if newest is not None:
        best = replacement_of_best(run, newest, identity, model, say)
        state, carried, recorded = restore(newest, run, model, optimizer, plateau, average)
        if best:
            state.best, state.best_step, lost = best
            state.lost.append(lost)
    else:
        torch.manual_seed(flags.seed + engine.rank)  # dropout differs between processes

    def begin() -> None:
        folder.write_environment(engine, sys.argv, resumes=newest is not None)
        folder.resume_metrics(state.step, recorded)
        state.lost += folder.lost

    engine.on_main(begin)
    for line in describe(run, model):
        say(line)
    for sentence in reservations(run, model):
        if engine.is_main:
            print(f"warning: {sentence}", file=sys.stderr)
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
                save(folder, run, model, optimizer, carried, state, plateau, average)
            except (OSError, SafetensorError) as error:
                raise TrainingError(
                    f"step {state.step} cannot be saved in {checkpoints}: {error}; fix that and rerun the same command to resume"
                ) from None
        if stop:
            progress.say(f"stopped at step {state.step}, saved in {checkpoints}; to resume: {resume_command(engine.world_size)}")
            return 128 + stop

    interrupt.at_once()  # everything is saved
    finish(run, folder, model, identity, state, average, progress.say)
    return 0


def is_complete(run: Run, identity: str, say) -> bool:
    """Return whether the run has its record. A damaged one is refused, or with --repair removed, to be written again."""
    path, checkpoints = Path(run.flags.work_dir), RunFolder.checkpoints_of(run.flags)
    try:
        if (record := read_result(path, identity)) is None:
            return False
        if (folder := checkpoints / name_of(record["best_step"])).exists() or (run.flags.repair and steps(checkpoints)):
            storage.Checkpoint(folder, identity)
    except Damaged as error:
        own = error.path == path / RESULT
        if not run.flags.repair and own:
            raise
        say(f"WARNING: {error.path} {error.fault}" + (f"; {RESULT} is written again" if run.flags.repair else ""))
        if run.flags.repair:
            if not own:
                storage.latest(checkpoints, say, identity)  # refused if there is nothing to go on with
            run.engine.barrier()
            if run.engine.is_main:
                shutil.rmtree(path / RESULT) if (path / RESULT).is_dir() else (path / RESULT).unlink()
            return False
    say(f"this run is complete: {path / RESULT}")
    return True


def finish(run: Run, folder: RunFolder | None, model, identity: str, state: State, average, say) -> None:
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
    checkpoints, lost = RunFolder.checkpoints_of(flags), state.lost if flags.repair else None
    routing = describe_routing(task, model, checkpoints, identity, lost) if run.selects_best else None
    chosen = state.best_step if run.selects_best else state.step
    tested = load_step(model, checkpoints, chosen, identity)
    for callback in run.callbacks:
        model = callback.finished(run, model)
    why = f"the best on validation{f' at k = {last_top_k(flags)}' if flags.moe else ''}" if run.selects_best else "the last"
    say(f"final test of step {chosen}, {why}")
    quality = evaluate_all(task, model, splits, ks, say)
    if folder is None:
        return
    metrics = folder.metrics()
    last = next((line for line in reversed(metrics) if line["split"] == "train"), {})  # none if they were lost
    training["method_metrics"] = {name: value for name, value in last.items() if "." in name}  # metrics named after modules
    measured = (quality, training, routing, metrics, describe_environment(engine), engine.peak_memory_mib(), chosen)
    result = build_result(run, model, *measured, sys.argv[1:]) | ({"lost": state.lost} if state.lost else {})
    documents.write(folder.path / RESULT, result | {"config_sha256": identity, "weights_sha256": tested.weights_sha256})
    folder.close()
    say(f"done: {folder.path / RESULT}")


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
    best = run.selects_best and (state.best is None or badness < state.best)
    if best:
        state.best, state.best_step = badness, state.step
    values = ", ".join(f"{value:.4f}" + ("" if at is None else f" at k = {at}") for at, value in found.items())
    split, best_so_far = "validation" if run.selects_best else task.splits[0], ", the best so far" if best else ""
    say(f"{split} at step {state.step}: {values} {metric}{best_so_far}")


def not_finite(step, lr, norm, loss, checkpoints) -> str:
    last = steps(checkpoints)
    return (
        f"loss or gradient is not finite at step {step}: loss {loss:.4g}, gradient norm {float(norm):.4g}, "
        f"lr {lr:.3g}; the update was not applied; last good checkpoint: {checkpoints / name_of(last[-1]) if last else 'none'}; "
        f"try a smaller --lr or --clip, or --precision fp32, in a new --work_dir"
    )


def evaluate_run(run: Run) -> int:
    """--eval_only: evaluates the weights that the run's table shows, at the given k, and writes eval.json beside result.json."""
    flags, engine, task, root = run.flags, run.engine, run.task, RunFolder.checkpoints_of(run.flags)
    say = print if engine.is_main else (lambda sentence: None)
    config = read_config(root.parent, note_unverified)
    if other := [name for name, found in run.fingerprints().items() if config.get(name, found) != found]:
        raise UserError(
            f"{root.parent} was trained with another {', '.join(other)}: --data, --checkpoint and tokenizer must be those of the run"
        )
    identity = config_sha256(config)
    step, weights = chosen_step(root, identity, say)
    model = run.build()
    load_step(model, root, step, identity, "restore it from a copy, or train again", weights)
    model = engine.prepare(model)
    ks = parse_ks(flags.k, flags.moe_num_expert) if flags.k and flags.moe else evaluation_ks(flags)
    rows = evaluate_all(task, model, task.splits[-1:], ks, say)
    if engine.is_main:
        found = {"best_step": step, "data": task.corpus.fingerprint, "config_sha256": identity, "quality": rows}
        documents.write(root.parent / "eval.json", found)
    return 0


def chosen_step(root: Path, identity: str, say) -> tuple[int, str | None]:
    """The step that --eval_only scores, and the sha256 of its weights where the run's record says it."""
    record = read_result(root.parent, identity, note_unverified)
    if record is not None:
        return record["best_step"], record.get("weights_sha256")
    if (root.parent / SURGERY).exists():
        return 0, None
    newest = storage.latest(root, say, identity)
    if newest is None:
        raise UserError(f"{root} holds no checkpoint: train first")
    best, last = newest.json(STATE, Stored)["best_step"], newest.step
    say(f"the run has not ended: scoring step {best or last}, {'the best so far on validation' if best else 'the last one saved'}")
    return best or last, None


if __name__ == "__main__":
    with exit_on_user_error(), Engine(FLAGS) as ENGINE:
        RUN = pretraining_run(FLAGS, CORPUS, ENGINE, SOURCE)
        sys.exit((evaluate_run if FLAGS.eval_only else main)(RUN))
