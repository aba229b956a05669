"""Validates flags: one sentence per mistake, with flag, value and remedy. Imports no torch."""

from importlib.util import find_spec
from math import isfinite
from operator import ge, gt, le, lt
from typing import Any

from smoe_dropout.methods.base import refused
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import ROUTERS, canonical_router, load, unknown
from utils.errors import UserError
from utils.flags.declare import Spec, specs
from utils.flags.derive import (
    CONFIG_FIELDS,
    built_options,
    is_count,
    k_range,
    method_of,
    parse_counts,
    parse_layers,
    routes_by_position,
    smoe_config,
)
from utils.flags.fields import Flags, names
from utils.flags.models import MODELS, presets_of
from utils.flags.presets import PRESET_NAMES

BACKEND_PACKAGES = {"fastmoe": "fmoe", "fused": "triton"}  # what an expert backend imports
LIMITS = {"low": ("at least", ge), "above": ("above", gt), "high": ("at most", le), "below": ("below", lt)}


def refuse(mistakes: list[str]) -> None:
    """Raises UserError if there are mistakes."""
    if mistakes:
        raise UserError("; ".join(mistakes) + " (nothing was started; --help lists all flags)")


def check_limits(flags: Any) -> list[str]:
    """Mistakes against the declarations of the flags, in any program: choices, limits, and flags without the one they need."""
    found, declared = [], specs(type(flags))
    for name, spec in declared.items():
        value, option = getattr(flags, name), spec.name or name
        if value is None:
            continue
        if spec.choices is not None and value not in spec.choices:
            found.append(f"--{option}: " + unknown("value", str(value), list(spec.choices)))
        elif limits := _broken_limits(value, spec):
            found.append(f"--{option} {value} must be {limits}")
        if spec.needs and not getattr(flags, spec.needs) and is_given(flags, name) and value != spec.since:
            found.append(f"--{option} needs --{declared[spec.needs].name or spec.needs}")
        known = declared["method"].choices if spec.only else ()  # an unknown method has been refused as such
        if spec.only and flags.method in known and flags.method not in spec.only and is_given(flags, name):
            found.append(no_effect(option, f"--method {flags.method}"))
    return found


def is_given(flags: Any, name: str) -> bool:
    """Return whether a flag differs from its declared default."""
    return getattr(flags, name) != type(flags).__dataclass_fields__[name].default


def no_effect(flag: str, where: str) -> str:
    """The message that refuses a flag without effect."""
    return f"--{flag} has no effect with {where}: leave it out"


def _broken_limits(value: Any, spec: Spec) -> str | None:
    """The limits of a flag in words, if its value is outside them. Every number has to be finite, and a whole one to fit 64 bits."""
    limits = [(word, limit, holds) for name, (word, holds) in LIMITS.items() if (limit := getattr(spec, name)) is not None]
    if isinstance(value, float) and not isfinite(value):
        limits.append(("finite", "", lambda value, _: False))
    elif isinstance(value, int) and abs(value) >= 1 << 63:
        limits.append(("below", "2**63", lambda value, _: False))
    if value == spec.special or all(holds(value, limit) for _, limit, holds in limits):
        return None
    besides = "" if spec.special is None else f", or {spec.special}"
    return " and ".join(f"{word} {limit}".strip() for word, limit, _ in limits) + besides


def check(flags: Flags) -> list[str]:
    """All mistakes in the flags of a training run."""
    found = check_limits(flags)
    if flags.model in MODELS and flags.preset in PRESET_NAMES:
        found += _check_model(flags)
    if flags.same_length and flags.mem_len == 0:
        found.append("--same_length lets every position attend to --mem_len positions, which is 0: leave one of them out")
    if is_given(flags, "weight_decay") and flags.optim != "adamw":
        found.append(f"--weight_decay {flags.weight_decay} has no effect with --optim {flags.optim}: leave it out, or use --optim adamw")
    if is_given(flags, "decayed") and flags.optim != "adamw":
        found.append(no_effect(f"decayed {flags.decayed}", f"--optim {flags.optim}"))
    if flags.k is not None and not flags.eval_only:
        found.append("--k selects what --eval_only evaluates; in training k comes from --moe_top_k or --dynamic_moe")
    if flags.train_only == "adapters" and flags.model in MODELS and not MODELS[flags.model].from_folder:
        found.append(f"--train_only adapters is for --model hf, not for --model {flags.model}: use --train_only experts")
    if flags.train_only == "experts" and is_given(flags, "adapter_rank"):
        found.append(no_effect("adapter_rank", "--train_only experts"))
    if flags.batch_chunk > flags.batch_size >= 1:
        found.append(f"--batch_chunk {flags.batch_chunk} must be at most --batch_size {flags.batch_size}")
    if flags.varlen and flags.compile:
        found.append("--varlen draws lengths, and --compile would compile a graph for each: leave one out")
    if flags.varlen and flags.tokens is not None:
        found.append(f"--tokens {flags.tokens}: with --varlen segments differ in length; use --max_step")
    if flags.cuda and flags.device == "cpu":
        found.append("--cuda contradicts --device cpu: leave one out")
    found += _check_average(flags) + _check_vocabulary(flags)
    found += _check_experts(flags) if flags.moe and flags.moe_num_expert >= 1 else []
    return found or _check_method(flags)


def _check_model(flags: Flags) -> list[str]:
    """Mistakes that depend on the architecture."""
    model, presets = MODELS[flags.model], presets_of(flags.model)
    if flags.preset not in presets:
        return [f"--preset {flags.preset} is none of --model {flags.model}: choose {', '.join(presets)}"]
    preset = presets[flags.preset]
    declared, fields = specs(type(flags)), type(flags).__dataclass_fields__
    usual = {name: (preset.get(name, fields[name].default), declared[name].since) for name in model.unknown_flags if name in fields}
    found = [no_effect(name, f"--model {flags.model}") for name, values in usual.items() if getattr(flags, name) not in values]
    if "mem_len" not in model.unknown_flags:
        if flags.eval_tgt_len > flags.mem_len + flags.tgt_len:
            found.append(f"--eval_tgt_len {flags.eval_tgt_len} must not exceed mem_len + tgt_len = {flags.mem_len + flags.tgt_len}")
        if flags.d_model % 2:
            found.append(f"--d_model {flags.d_model} must be even, for its sinusoidal positions")
    if "d_head" in model.unknown_flags and flags.n_head >= 1 and flags.d_model % flags.n_head:
        found.append(f"--d_model {flags.d_model} is not divisible by --n_head {flags.n_head}")
    if "pieces" in model.reads and 1 <= flags.tgt_len < 3:
        found.append(f"--tgt_len {flags.tgt_len} must be at least 3, for [CLS], a piece and [SEP]")
    return found


def _check_average(flags: Flags) -> list[str]:
    """Mistakes in the range of steps of --swad."""
    found = []
    if flags.swad and flags.swad_start > flags.max_step:
        found.append(f"--swad_start {flags.swad_start} is after --max_step {flags.max_step}")
    if not flags.swad and flags.swad_end not in (-1, flags.max_step):
        found.append("--swad_end needs --swad")
    if 1 <= flags.swad_end < flags.swad_start:
        found.append(f"--swad_end {flags.swad_end} is before --swad_start {flags.swad_start}")
    return found


def _check_vocabulary(flags: Flags) -> list[str]:
    """Mistakes in what is for large vocabularies. Its shapes depend on the tokens, which torch.compile cannot capture."""
    given = ["--adaptive"] * flags.adaptive + [f"--sample_softmax {flags.sample_softmax}"] * (flags.sample_softmax > 0)
    given += ["--compile"] * flags.compile
    found = [f"{' and '.join(given)} cannot be combined: leave out all but one"] if len(given) > 1 else []
    if not flags.adaptive:
        return found
    words = flags.cutoffs.split(",")
    cutoffs = [int(word) for word in words if is_count(word)]
    if len(cutoffs) < len(words) or cutoffs != sorted(set(cutoffs)) or cutoffs[0] < 1:
        found.append(f"--cutoffs {flags.cutoffs}: expected ascending numbers of tokens separated by commas, such as 20000,40000,200000")
    elif flags.div_val >= 1 and 1 <= flags.d_model < flags.div_val ** len(cutoffs):
        found.append(f"--div_val {flags.div_val} leaves no width of --d_model {flags.d_model} to the last cluster: choose a smaller one")
    if flags.untied_projections and flags.div_val == 1:
        found.append(no_effect("untied_projections", "--div_val 1"))
    return found


def _check_experts(flags: Flags) -> list[str]:
    found, E = [], flags.moe_num_expert
    if flags.d_inner is None and (flags.d_ff or 0) % E:
        remedy = "choose another, or give the width of one expert with --d_inner"
        found.append(f"--d_ff {flags.d_ff} is not divisible by --moe_num_expert {E}: {remedy}")
    for name in names(follows="moe_num_expert", group="experts"):
        k = getattr(flags, name)
        if k is not None and not 1 <= k <= E:
            found.append(f"--{name} {k} must be from 1 to --moe_num_expert {E}")
    package = BACKEND_PACKAGES.get(flags.expert_backend)
    if package and find_spec(package) is None:
        found.append(f"--expert_backend {flags.expert_backend} needs the package {package}, which is not installed: use auto")
    low, high = k_range(flags)
    if low > high:
        found.append(f"--moe_top_k_min {low} exceeds --moe_top_k_max {high}")
    if flags.dynamic_router_start > 0 and flags.freeze_gate:
        found.append(f"--dynamic_router_start {flags.dynamic_router_start} trains the router at first, --freeze_gate never: leave one out")
    layers, mistakes = parse_layers(flags.moe_index, flags.n_layer)
    found += [f"--moe_index {flags.moe_index}: {mistake}" for mistake in mistakes]
    if flags.moe_experts_by_layer is not None:
        mistakes = _check_experts_by_layer(flags, flags.n_layer if layers is None else len(layers))
        found += [f"--moe_experts_by_layer {flags.moe_experts_by_layer}: {mistake}" for mistake in mistakes]
    if flags.moe_prune_to is not None:
        if flags.moe_expert_rank is None or (flags.start_from is None and not flags.eval_only):
            found.append(f"--moe_prune_to {flags.moe_prune_to} needs --start_from a folder of surgery.py --method compress")
        if flags.moe_prune_to > flags.moe_sparse_share:
            found.append(f"--moe_prune_to {flags.moe_prune_to} must be at most {flags.moe_sparse_share}, the share that is left")
        if flags.swad:
            found.append("--moe_prune_to cannot be combined with --swad: an average of weights is not pruned")
    return found


def _check_experts_by_layer(flags: Flags, layers: int) -> list[str]:
    """`layers`: the number of layers with experts."""
    if not all(is_count(word) and int(word) >= 1 for word in flags.moe_experts_by_layer.split(",")):
        return ["expected numbers of experts separated by commas, such as 8,6,10,8"]
    counts = parse_counts(flags.moe_experts_by_layer)
    found = [] if len(counts) == layers else [f"{len(counts)} numbers for {layers} layers with experts"]
    found += [] if max(counts) == flags.moe_num_expert else [f"--moe_num_expert must be the largest of them, {max(counts)}"]
    return found + ([] if flags.d_inner else ["needs --d_inner, the width of one expert"])


def _check_method(flags: Flags) -> list[str]:
    """Mistakes of the method, its options and its router, if there are no others."""
    method = method_of(flags)
    if flags.dense_drop and not (method and method.flags.get("dense_drop")):
        others = [f"--method {flags.method}"] * (flags.method is not None) + ["--moe"] * flags.moe
        return [f"--dense_drop cannot be combined with {' and '.join(others)}: leave one out"]
    if method and method.sparse != flags.moe:
        kind = "has experts" if method.sparse else "is dense"
        return [f"--method {method.name} {kind}, which contradicts --moe: leave one out"]
    if flags.sample_softmax > 0 and (flags.teacher or (method and method.reads_logits)):
        reader = "--teacher" if flags.teacher else f"--method {method.name}"
        return [f"--sample_softmax {flags.sample_softmax} computes the logits of some tokens, and {reader} reads all: leave one out"]
    try:
        built_options(flags)
        if found := _ignored_by_router(flags):
            return found
        if flags.attn_type > 1 and flags.eval_tgt_len != flags.tgt_len and routes_by_position(flags):
            return [f"--attn_type {flags.attn_type} evaluates --method {method.name} by whole segments: use --eval_tgt_len {flags.tgt_len}"]
        sentence = refused(method, smoe_config(flags, method)) if flags.moe else None
    except ConfigError as error:
        return [f"--method_options {flags.method_options}: {error}" if flags.method_options else str(error)]
    return [f"--method {method.name}: {sentence}" if method else f"--gate_name: {sentence}"] if sentence else []


def _ignored_by_router(flags: Flags) -> list[str]:
    """Given flags that the router ignores."""
    given = [name for name in ("load_balance", "gate_weight") if flags.moe and is_given(flags, name)]
    uses = load(ROUTERS, "router", canonical_router(flags.gate_name)[0]).uses if given else ()
    ignored = [name for name in given if CONFIG_FIELDS[name] not in uses]
    return [no_effect(f"{name} {getattr(flags, name)}", f"router {flags.gate_name!r}") for name in ignored]
