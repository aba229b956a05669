"""Validates the flags of train.py: one sentence for each mistake. Imports no torch."""

import dataclasses

from smoe_dropout.methods.base import refused
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import METHODS, ROUTERS, canonical_router, load, unknown
from utils.flags.derive import _is_count, built_options, k_range, method_of, parse_counts, parse_layers, smoe_config
from utils.flags.fields import CHOICES, MEANINGLESS, NOT_NEGATIVE, OF_EXPERTS, OF_PIECES, POSITIVE, Flags
from utils.flags.presets import PRESETS


def check(flags: Flags) -> list[str]:
    """One sentence for every mistake, with flag, value and remedy."""
    found = [
        f"--{name}: " + unknown("value", str(getattr(flags, name)), list(choices))
        for name, choices in CHOICES.items()
        if getattr(flags, name) not in choices
    ]
    found += [f"--{name} {getattr(flags, name)} must be at least 1" for name in POSITIVE if getattr(flags, name) < 1]
    found += [f"--{name} {getattr(flags, name)} must not be negative" for name in NOT_NEGATIVE if getattr(flags, name) < 0]
    for name in ("d_ff", "d_inner"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            found.append(f"--{name} {getattr(flags, name)} must be at least 1")
    for name in ("dropout", "dropatt"):
        if not 0 <= getattr(flags, name) < 1:
            found.append(f"--{name} {getattr(flags, name)} must be from 0 to below 1")
    for name in ("lr", "clip", "init_std", "decay_rate", "teacher_weight", "teacher_temperature"):
        if not getattr(flags, name) > 0:
            found.append(f"--{name} {getattr(flags, name)} must be positive")
    found += _check_model(flags) if flags.model in MEANINGLESS else []
    of_pieces = flags.model in OF_PIECES
    if not of_pieces and flags.eval_tgt_len > flags.mem_len + flags.tgt_len:
        found.append(f"--eval_tgt_len {flags.eval_tgt_len} must not exceed mem_len + tgt_len = {flags.mem_len + flags.tgt_len}")
    if not of_pieces and flags.d_model % 2:
        found.append(f"--d_model {flags.d_model} must be even, for its sinusoidal positions")
    if flags.same_length and flags.mem_len == 0:
        found.append("--same_length lets every position see --mem_len positions, and that is 0: leave one of them out")
    if flags.weight_decay != Flags.weight_decay and flags.optim != "adamw":
        found.append(f"--weight_decay {flags.weight_decay} means nothing to --optim {flags.optim}: leave it out, or use --optim adamw")
    if flags.k is not None and not flags.eval_only:
        found.append("--k chooses what --eval_only evaluates; in training k comes from --moe_top_k or --dynamic_moe")
    if flags.teacher is not None and flags.start_from is None:
        found.append(f"--teacher {flags.teacher} needs --start_from, the weights that it is to teach")
    for name in ("teacher_weight", "teacher_temperature"):
        if flags.teacher is None and getattr(flags, name) != getattr(Flags, name):
            found.append(f"--{name} needs --teacher")
    if flags.cuda and flags.device == "cpu":
        found.append("--cuda contradicts --device cpu: leave one out")
    if flags.swad and flags.swad_start > flags.max_step:
        found.append(f"--swad_start {flags.swad_start} lies behind --max_step {flags.max_step}")
    if flags.swad_end == 0:
        found.append("--swad_end 0 leaves no step to average: give a later one, or -1 for --max_step")
    if not flags.swad and (flags.swad_start, flags.swad_end) not in ((0, -1), (0, flags.max_step)):
        found.append("--swad_start and --swad_end need --swad")
    if flags.swad_end != -1 and flags.swad_end < flags.swad_start:
        found.append(f"--swad_end {flags.swad_end} lies before --swad_start {flags.swad_start}")
    found += _check_experts(flags) if flags.moe else _check_dense(flags)
    return found or _check_method(flags)


def _check_model(flags: Flags) -> list[str]:
    """Of the flags that only some models know."""
    usual = {**dataclasses.asdict(Flags()), **PRESETS[flags.model].get(flags.preset, {})}
    found = [
        f"--{name} means nothing to --model {flags.model}: leave it out"
        for name in MEANINGLESS[flags.model]
        if getattr(flags, name) != usual[name]
    ]
    if not 0 < flags.mask_rate < 1:
        found.append(f"--mask_rate {flags.mask_rate} must be between 0 and 1")
    if flags.model in OF_PIECES and flags.n_head >= 1 and flags.d_model % flags.n_head:
        found.append(f"--d_model {flags.d_model} is not divisible by --n_head {flags.n_head}")
    if flags.model in OF_PIECES and 1 <= flags.tgt_len < 3:
        found.append(f"--tgt_len {flags.tgt_len} must be at least 3, for [CLS], a piece and [SEP]")
    return found


def _check_dense(flags: Flags) -> list[str]:
    return [f"--{name} needs --moe" for name in OF_EXPERTS if getattr(flags, name) != getattr(Flags, name)]


def _check_method(flags: Flags) -> list[str]:
    """Of a command line that is right otherwise: what the method and its options make of it."""
    if flags.method is not None and flags.method not in METHODS:
        return []  # said already
    method = method_of(flags)
    if flags.dense_drop and not (method and method.flags.get("dense_drop")):
        others = [f"--method {flags.method}"] * (flags.method is not None) + ["--moe"] * flags.moe
        return [f"--dense_drop cannot be combined with {' and '.join(others)}: leave one out"]
    if method and method.sparse != flags.moe:
        kind = "has experts" if method.sparse else "is dense"
        return [f"--method {method.name} {kind}, and --moe says otherwise: leave one out"]
    try:
        built_options(flags)
        if found := _ignored_by_router(flags):
            return found
        sentence = refused(method, smoe_config(flags, method)) if flags.moe else None
    except ConfigError as error:
        return [f"--method_options {flags.method_options}: {error}" if flags.method_options else str(error)]
    return [f"--method {method.name}: {sentence}" if method else f"--gate_name: {sentence}"] if sentence else []


def _ignored_by_router(flags: Flags) -> list[str]:
    """Settings given that the router makes nothing of."""
    settings = {"load_balance": "balance_loss", "gate_weight": "gate_weight"}  # by their names in the library
    given = [name for name in settings if flags.moe and getattr(flags, name) != getattr(Flags, name)]
    uses = load(ROUTERS, "router", canonical_router(flags.gate_name)[0]).uses if given else ()
    idle = [name for name in given if settings[name] not in uses]
    return [f"--{name} {getattr(flags, name)} means nothing to router {flags.gate_name!r}: leave it out" for name in idle]


def _check_experts(flags: Flags) -> list[str]:
    found, E = [], flags.moe_num_expert
    if E < 1:
        return found
    if flags.d_inner is None and (flags.d_ff or 0) % E:
        found.append(
            f"--d_ff {flags.d_ff} is not divisible by --moe_num_expert {E}: choose another, or give the width of one expert by --d_inner"
        )
    for name in ("moe_top_k", "moe_top_k_min", "moe_top_k_max"):
        k = getattr(flags, name)
        if k is not None and not 1 <= k <= E:
            found.append(f"--{name} {k} must be from 1 to --moe_num_expert {E}")
    low, high = k_range(flags)
    if low > high:
        found.append(f"--moe_top_k_min {low} exceeds --moe_top_k_max {high}")
    if flags.dynamic_router_start < -1:
        found.append(f"--dynamic_router_start {flags.dynamic_router_start} must be a step, or -1 for none")
    if flags.dynamic_router_start > 0 and flags.freeze_gate:
        found.append(
            f"--dynamic_router_start {flags.dynamic_router_start} trains the router up to that step, --freeze_gate never: leave one out"
        )
    if flags.dynamic_overall_steps != -1 and flags.dynamic_overall_steps < 1:
        found.append(f"--dynamic_overall_steps {flags.dynamic_overall_steps} must be at least 1, or -1 for all --max_step steps")
    layers, mistakes = parse_layers(flags.moe_index, flags.n_layer)
    found += [f"--moe_index {flags.moe_index}: {mistake}" for mistake in mistakes]
    if flags.moe_experts_by_layer is not None:
        mistakes = _check_experts_by_layer(flags, flags.n_layer if layers is None else len(layers))
        found += [f"--moe_experts_by_layer {flags.moe_experts_by_layer}: {mistake}" for mistake in mistakes]
    if flags.moe_prune_to is not None:
        if flags.moe_expert_rank is None or (flags.start_from is None and not flags.eval_only):
            found.append(f"--moe_prune_to {flags.moe_prune_to} needs --start_from a folder of surgery.py --method compress")
        if not 0 < flags.moe_prune_to <= flags.moe_sparse_share:
            found.append(f"--moe_prune_to {flags.moe_prune_to} must be above 0, and {flags.moe_sparse_share}, which is left, at most")
        if flags.swad:
            found.append("--moe_prune_to cannot be combined with --swad: a mean of weights is not pruned")
    try:
        smoe_config(dataclasses.replace(flags, moe_index=None, moe_experts_by_layer=None, moe_top_k=None, method_options=None))
    except ConfigError as error:
        found.append(str(error).replace("router", "--gate_name", 1) if "unknown router" in str(error) else str(error))
    return found


def _check_experts_by_layer(flags: Flags, layers: int) -> list[str]:
    """`layers`: how many have experts."""
    if not all(_is_count(word) and int(word) >= 1 for word in flags.moe_experts_by_layer.split(",")):
        return ["expected numbers of experts separated by commas, such as 8,6,10,8"]
    counts = parse_counts(flags.moe_experts_by_layer)
    found = [] if len(counts) == layers else [f"{len(counts)} numbers for {layers} layers with experts"]
    found += [] if max(counts) == flags.moe_num_expert else [f"--moe_num_expert has to be the largest of them, {max(counts)}"]
    return found + ([] if flags.d_inner else ["needs --d_inner, the width of one expert"])
