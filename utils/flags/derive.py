"""Values derived from the flags: method, options, schedule of k, configuration of the library. Imports no torch."""

import dataclasses
from typing import Any

from smoe_dropout.config import SMoEConfig
from smoe_dropout.methods.base import Method
from smoe_dropout.options import ConfigError, NoOptions, build_options, earlier_options, option_names
from smoe_dropout.registry import METHODS, ROUTERS, canonical_router, load
from smoe_dropout.schedule import TopKSchedule
from utils.errors import UserError
from utils.flags.declare import FlagsT, specs
from utils.flags.fields import EARLIER, Flags, names
from utils.flags.models import MODELS, presets_of

CONFIG_FIELDS = {  # fields of the library's configuration by the flags with the same values
    **{"moe_num_expert": "num_experts", "moe_expert_rank": "expert_rank", "moe_sparse_share": "sparse_share"},
    **{"gate_name": "router", "gate_weight": "gate_weight", "load_balance": "balance_loss", "output_scale": "output_scale"},
}


def method_of(flags: Flags) -> Method | None:
    """The method given by name, or else the one that the official flags match."""
    name = flags.method or matching_method(resolve(dataclasses.replace(flags, method="custom")))
    return load(METHODS, "method", name) if name else None


def routes_by_position(flags: Flags) -> bool:
    """Return whether the method routes a position by the others of its segment."""
    method = method_of(flags)
    return bool(method and method.layer and method.layer.needs)


def method_flags(name: str | None) -> dict[str, Any]:
    """The flags a method sets; none for an unknown one, which `check` reports."""
    return dict(load(METHODS, "method", name).flags) if name in METHODS else {}


def matching_method(flags: Flags) -> str | None:
    """The first method in the registry whose flags all have these values."""
    return next((name for name in METHODS if all(getattr(flags, key) == value for key, value in method_flags(name).items())), None)


def parse_options(text: str | None) -> dict[str, str]:
    """ "alpha=5,inference=token" -> {"alpha": "5", "inference": "token"}. Raises ConfigError for anything else."""
    pairs = [word.partition("=") for word in (text or "").split(",") if word]
    if not all(name.strip() and sign and value for name, sign, value in pairs):
        raise ConfigError("expected name=value pairs separated by commas, such as alpha=5,inference=token")
    return {name.strip(): value.strip() for name, _, value in pairs}


def idle(flags: Flags) -> tuple[str, ...]:
    """Names of the flags that have no effect on this model, or without another flag that is not set."""
    needing = (name for name, spec in specs(type(flags)).items() if spec.needs and not getattr(flags, spec.needs))
    return (*MODELS[flags.model].unknown_flags, *needing)


def given_options(flags: Flags, method: Method | None) -> dict[str, Any]:
    """The options given, and with --defaults earlier those of the method that had another default."""
    values = parse_options(flags.method_options)
    return earlier_options(method.options, values) if method and flags.defaults == EARLIER else values


def built_options(flags: Flags) -> list[Any]:
    """The options of the method and, if any are given, of the router. Raises ConfigError for an unknown option or a wrong value."""
    method = method_of(flags)
    values, kinds = given_options(flags, method), [method.options if method else NoOptions]
    if values and flags.moe:
        kinds.append(load(ROUTERS, "router", canonical_router(flags.gate_name)[0]).Options)
    return [build_options(kind, values, option_names(kinds)) for kind in kinds]


def parse_layers(text: str | None, n_layer: int) -> tuple[tuple[int, ...] | None, list[str]]:
    """ "0,1,3" -> (0, 1, 3), or None for all layers; and a sentence for each mistake."""
    if text is None:
        return None, []
    words = text.split(",")
    if not all(is_count(word) for word in words):
        return None, ["expected layer numbers separated by commas, such as 0,1,2,3"]
    layers = tuple(int(word) for word in words)
    outside = [layer for layer in layers if layer >= n_layer]
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    mistakes = [f"layer {', '.join(map(str, outside))} is outside 0..{n_layer - 1} (--n_layer {n_layer})"] if outside else []
    mistakes += [f"layer {', '.join(map(str, repeated))} is named more than once"] if repeated else []
    return layers, mistakes


def parse_counts(text: str | None) -> tuple[int, ...] | None:
    """--moe_experts_by_layer of checked flags: "8,6" -> (8, 6)."""
    return None if text is None else tuple(int(word) for word in text.split(","))


def is_count(word: str) -> bool:
    """Return whether a word is a whole number in ASCII digits."""
    return word.strip().isascii() and word.strip().isdigit()


def k_range(flags: Flags) -> tuple[int, int]:
    """k_min and k_max of the schedule; E/2 and E as in the paper, unless given."""
    E = flags.moe_num_expert
    low = max(1, E // 2) if flags.moe_top_k_min is None else flags.moe_top_k_min
    return low, E if flags.moe_top_k_max is None else flags.moe_top_k_max


def top_k_schedule(flags: Flags) -> TopKSchedule | None:
    """k by step; None for a dense model."""
    if not flags.moe:
        return None
    if flags.dynamic_moe:
        return TopKSchedule(flags.dynamic_moe_mode, flags.moe_top_k_min, flags.moe_top_k_max, flags.dynamic_overall_steps, flags.seed)
    return TopKSchedule("constant", flags.moe_top_k, flags.moe_top_k, flags.max_step)


def last_top_k(flags: Flags) -> int | None:
    """k at the end of training, at which validation selects the weights; None for a dense model."""
    schedule = top_k_schedule(flags)
    return schedule(flags.max_step) if schedule else None


def evaluation_ks(flags: Flags) -> list[int | None]:
    """k of the final test: powers of two up to E, E/2 and E; [None], one test, for a dense model."""
    if not flags.moe:
        return [None]
    E = flags.moe_num_expert
    return sorted({1 << power for power in range(E.bit_length()) if 1 << power <= E} | {max(1, E // 2), E})


def parse_ks(text: str, E: int) -> list[int | None]:
    """--k of --eval_only. Raises UserError."""
    words = text.split(",")
    if not all(is_count(word) and 1 <= int(word) <= E for word in words):
        raise UserError(f"--k {text}: expected numbers of active experts from 1 to {E}, separated by commas, such as 1,2,4")
    return [int(word) for word in words]


def finetuning_k(values: dict[str, Any]) -> dict[str, Any]:
    """k of fine-tuning: all experts, as in the paper, unless the method fixes another."""
    if not values.get("moe"):
        return {}
    k = method_flags(values["method"]).get("moe_top_k", values.get("moe_num_expert", Flags.moe_num_expert))
    return {"moe_top_k": k, "dynamic_moe": False}


def resolve(flags: FlagsT) -> FlagsT:
    """Decides every default that depends on another flag, so that config.json is explicit."""
    E = flags.moe_num_expert
    d_inner = flags.d_inner if flags.d_inner is not None else (flags.d_ff or 0) // (E if flags.moe else 1)
    changes: dict[str, Any] = {"d_inner": d_inner, "d_ff": d_inner * E if flags.moe else d_inner}
    changes["data"] = flags.data or f"data/{flags.dataset}"
    if flags.tokens is not None:
        flags = dataclasses.replace(flags, max_step=max(1, flags.tokens // (flags.batch_size * flags.tgt_len)))
    changes["swad_end"] = flags.max_step if flags.swad_end == -1 else flags.swad_end
    if flags.cuda:
        changes["device"] = "cuda"
    if flags.moe:
        router, implied = canonical_router(flags.gate_name)
        changes["gate_name"] = router
        if len(parse_layers(flags.moe_index, flags.n_layer)[0] or ()) == flags.n_layer:
            changes["moe_index"] = None  # all layers, the default
        if set(parse_counts(flags.moe_experts_by_layer) or ()) == {E}:
            changes["moe_experts_by_layer"] = None  # all equal, the default
        if "options" in implied:
            implied_options = [f"{name}={value}" for name, value in implied["options"].items()]
            changes["method_options"] = ",".join([*implied_options, *filter(None, [flags.method_options])])  # the last value counts
        changes["load_balance"] = flags.load_balance if flags.load_balance is not None else implied.get("balance_loss")
        changes["moe_top_k_min"], changes["moe_top_k_max"] = k_range(flags)
        changes["moe_top_k"] = flags.moe_top_k if flags.moe_top_k is not None else max(1, E // 2)
        changes["dynamic_overall_steps"] = flags.max_step if flags.dynamic_overall_steps == -1 else flags.dynamic_overall_steps
    flags = dataclasses.replace(flags, **changes)
    flags = dataclasses.replace(flags, method=flags.method or matching_method(flags))
    if flags.work_dir is None:
        name = f"{flags.run_name or flags.method or 'custom'}-seed{flags.seed}"
        flags = dataclasses.replace(flags, work_dir=f"{flags.default_folder()}/{name}")
    return flags


def resized(flags: Flags, **changes: Any) -> Flags:
    """The flags with another number of experts of the same width, k and its schedule at the defaults for that number."""
    follow = dict.fromkeys(names(follows="moe_num_expert"))
    return resolve(dataclasses.replace(flags, **{**follow, **changes}))


def training_flags(model: str, method: str | None, preset: str) -> dict[str, Any]:
    """The flags that a preset and a method set."""
    return {**presets_of(model)[preset], **method_flags(method)}


def usual_flags(flags: Flags) -> Flags:
    """The flags of a run given only by model, preset and method."""
    usual = training_flags(flags.model, flags.method, flags.preset)
    return Flags(**{**usual, "model": flags.model, "preset": flags.preset, "method": flags.method})


def smoe_config(flags: Flags, method: Method | None = None) -> SMoEConfig:
    """The library's configuration of the experts, with the method's layer. Raises ConfigError."""
    return SMoEConfig(
        **{field: getattr(flags, name) for name, field in CONFIG_FIELDS.items()},
        top_k=flags.moe_top_k or max(1, flags.moe_num_expert // 2),
        d_expert=flags.d_inner,
        freeze_router=flags.freeze_gate,
        layers=parse_layers(flags.moe_index, flags.n_layer)[0],
        experts_by_layer=parse_counts(flags.moe_experts_by_layer),
        backend=flags.expert_backend,
        init_std=flags.init_std,
        method=method.name if method and method.layer else None,
        options=given_options(flags, method),
    )
