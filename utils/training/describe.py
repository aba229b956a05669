"""Describes a run in a few lines when it starts."""

import torch
from torch import nn

from smoe_dropout import moe_layers
from smoe_dropout.checks import untrained_router
from smoe_dropout.hosts import find_sites
from utils.data.rows import kind_of
from utils.flags.derive import top_k_schedule
from utils.flags.fields import Flags
from utils.models.flops import parameter_counts
from utils.training.record import moe_layer_indices
from utils.training.run import Run


def describe(run: Run, model: nn.Module) -> list[str]:
    """Lines with the sizes, data, origin of the weights, experts, and machine."""
    flags, engine, counts = run.flags, run.engine, parameter_counts(model)
    title = f"{flags.method or 'custom'} on {run.task.corpus.title}"
    lines = [f"{title}: {counts['total']:,} parameters, {counts['trainable']:,} trainable", f"work_dir: {flags.work_dir}"]
    lines += _origin(run) + [line for callback in run.callbacks for line in callback.describe()]
    lines += _experts(flags, model) if flags.moe else []
    name = f"{engine.device.type} ({engine.device_name})"
    threads = torch.get_num_threads()
    return [*lines, f"{flags.precision} on {name}, {engine.world_size} process(es), {threads} thread(s) each; {flags.max_step} steps"]


def reservations(run: Run, model: nn.Module) -> list[str]:
    """Sentences on what the flags will not do, known before training."""
    if (schedule := top_k_schedule(run.flags)) is None:
        return []
    if untrained := untrained_router(model, k=schedule.k_max if schedule.drawn else schedule.k_min):
        return [f"{untrained} (k: {schedule})"]
    for _, layer in moe_layers(model):
        layer.router_named |= schedule.drawn  # passes with k = 1 do not train it, the others do
    return []


def _origin(run: Run) -> list[str]:
    """Rows of a fine-tuning task, and where the weights come from; nothing for pre-training from random weights."""
    flags, source = run.flags, run.source
    if not run.is_finetuning:
        return [f"weights from {source.path} ({source.summary})"] if source else []
    kept, new, unused = run.handed_over
    folds = kind_of(flags.task).folds
    rows = ", ".join(f"{count:,} {split}" for split, count in run.task.corpus.sizes.items())
    fold = f", fold {flags.fold} of {folds} held out" if folds > 1 else ""
    origin = "from" if run.transfers else "random, in a model like that of"
    more = "".join(f"; {what}: {', '.join(names)}" for what, names in (("new", new), ("not used", unused)) if names)
    return [f"rows: {rows}{fold}", f"weights {origin} {source.path} ({source.summary}): {kept:,} parameters{more}"]


def _experts(flags: Flags, model: nn.Module) -> list[str]:
    indices = moe_layer_indices(flags)
    dense = [index for index in range(flags.n_layer) if index not in indices]
    rest = f"; layers {dense} stay dense, {find_sites(model)[0].d_ff} wide" if dense else ""
    lines = [f"experts: {flags.moe_num_expert} x {flags.d_inner} in layers {indices}{rest}"]
    if flags.attn_moe:
        lines.append(f"queries, keys and values: top-1 experts in layers {indices}")
    trainable = [parameter.requires_grad for _, layer in moe_layers(model) for parameter in layer.routing_parameters()]
    schedule = top_k_schedule(flags)
    router = ("trained" if any(trainable) else "frozen") if trainable else "without parameters"
    lines.append(f"router: {flags.gate_name}, {router}; k: {schedule}")
    if flags.dynamic_moe and flags.moe_top_k != max(1, flags.moe_num_expert // 2):
        lines.append(f"note: --moe_top_k {flags.moe_top_k} has no effect, k follows the schedule")
    tokens = flags.batch_size * flags.tgt_len // flags.batch_chunk
    dtype = torch.bfloat16 if flags.precision == "bf16" else torch.float32
    experts = moe_layers(model)[0][1].experts
    found = {k: experts.backend_for(tokens, k, dtype) for k in sorted({schedule.k_min, schedule.k_max})}
    backends = ", ".join(f"{name} at k = {k}" for k, name in found.items())
    return [*lines, f"expert backend: {backends}" + (" (auto)" if flags.expert_backend == "auto" else "")]
