"""The command line of train.py: flags, presets and methods, checked before anything is read. Imports no torch.

Order of precedence: the command line, the method's flags, the preset, the defaults in flags.py. `_` and `-` are alike in names.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from smoe_dropout.config import SMoEConfig
from smoe_dropout.methods.base import Method, refused
from smoe_dropout.options import ConfigError, NoOptions, build_options, option_names
from smoe_dropout.registry import METHODS, ROUTERS, canonical_router, load, unknown
from smoe_dropout.schedule import TopKSchedule
from utils.errors import UserError, exit_on_user_error
from utils.flags import (
    CHOICES,
    DERIVED,
    MEANINGLESS,
    NOT_NEGATIVE,
    OF_EXPERTS,
    OF_PIECES,
    OF_THE_RUN,
    OF_THE_START,
    POSITIVE,
    REFUSED,
    SINCE,
    Flags,
)
from utils.presets import PRESETS

FlagsOf = TypeVar("FlagsOf", bound=Flags)


def parse(argv: Sequence[str] | None = None) -> Flags:
    """The flags of a command line, with preset and method filled in and every default decided.

    Raises UserError listing all mistakes; a flag that cannot be parsed ends the process with tyro's message and exit code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    argv, mistakes = without_refused(argv)
    defaults, more = _defaults(argv)
    flags = from_command_line(argv, defaults)
    mistakes += more + check(flags)
    if mistakes:
        raise UserError("; ".join(mistakes) + " (nothing was started; --help lists all flags)")
    return resolve(flags)


def stored_run(argv: Sequence[str] | None = None, kind: type[FlagsOf] = Flags, program: str = "train.py") -> FlagsOf | None:
    """With --eval_only, the flags of the run in --work_dir with the command line laid over them; else None. Raises UserError as `parse`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not {"--eval_only", "--eval-only"} & set(argv):
        return None
    folder = value_of(argv, "work_dir")
    if folder is None:
        raise UserError("--eval_only needs --work_dir, the folder of the run to evaluate")
    stored = read_config(Path(folder))
    names = {field.name for field in dataclasses.fields(kind)}
    if ("task" in stored) != ("task" in names):
        other = "finetune.py" if "task" in stored else "train.py"
        raise UserError(f"{folder} is a run of {other}: evaluate it with python {other} --eval_only")
    flags = from_command_line(argv, kind(**{name: value for name, value in stored.items() if name in names}), program)
    if mistakes := check(flags):
        raise UserError("; ".join(mistakes))
    if flags.k is not None:
        if not flags.moe:
            raise UserError(f"--k {flags.k}: the run in {folder} is dense; leave it out")
        parse_ks(flags.k, flags.moe_num_expert)
    return flags


def from_command_line(argv: list[str], defaults: FlagsOf, program: str = "train.py") -> FlagsOf:
    """The defaults with what the command line says over them."""
    return tyro.cli(type(defaults), args=argv, default=defaults, prog=program, config=(tyro.conf.HelptextFromCommentsOff,))


def without_refused(argv: list[str]) -> tuple[list[str], list[str]]:
    """The command line without official flags that are refused and their values, and a sentence for each of them."""
    kept, mistakes, refused = [], [], False
    for word in argv:
        if word.startswith("--"):
            flag = word.split("=")[0]
            name = flag.removeprefix("--").replace("-", "_")
            refused = name in REFUSED
            if refused:
                mistakes.append(f"{flag}: {REFUSED[name]}")
        if not refused:
            kept.append(word)
    return kept, mistakes


def value_of(argv: list[str], name: str) -> str | None:
    """The last value of --name on the command line, before the whole of it can be parsed."""
    value = None
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word in (f"--{name}", f"--{name.replace('_', '-')}"):
            value = following
        elif word.startswith(f"--{name}="):
            value = word.partition("=")[2]
    return value


def _defaults(argv: list[str]) -> tuple[Flags, list[str]]:
    model, preset = (value_of(argv, name) or getattr(Flags, name) for name in ("model", "preset"))
    method, mistakes = value_of(argv, "method"), []
    if method is not None and method not in METHODS:
        mistakes.append("--method: " + unknown("method", method, METHODS))
        method = None
    meant = load(METHODS, "method", method).flags if method else {}
    presets = PRESETS.get(model, PRESETS[Flags.model])
    values = {**presets.get(preset, presets[Flags.preset]), **named_data(argv), **meant}
    return Flags(**{**values, "model": model, "preset": preset}), mistakes


def named_data(argv: list[str]) -> dict[str, str]:
    """A text given as a folder has the folder's name, unless the command line says another."""
    return {"dataset": Path(data).name} if (data := value_of(argv, "data")) else {}


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


def method_of(flags: Flags) -> Method | None:
    """The method given by name, or else by the official flags."""
    name = flags.method or matching_method(resolve(dataclasses.replace(flags, method="custom")))
    return load(METHODS, "method", name) if name else None


def parse_options(text: str | None) -> dict[str, str]:
    """ "alpha=5,inference=token" -> {"alpha": "5", "inference": "token"}. ConfigError for anything else."""
    pairs = [word.partition("=") for word in (text or "").split(",") if word]
    if not all(name.strip() and sign and value for name, sign, value in pairs):
        raise ConfigError("expected name=value pairs separated by commas, such as alpha=5,inference=token")
    return {name.strip(): value.strip() for name, _, value in pairs}


def method_options(flags: Flags) -> Any:
    """The method's options."""
    return built_options(flags)[0]


def built_options(flags: Flags) -> list[Any]:
    """The options of the method, and if any are given those of the router. ConfigError for one that neither has, or a wrong value."""
    values, method = parse_options(flags.method_options), method_of(flags)
    kinds = [method.options if method else NoOptions]
    if values and flags.moe:
        kinds.append(load(ROUTERS, "router", canonical_router(flags.gate_name)[0]).Options)
    return [build_options(kind, values, option_names(kinds)) for kind in kinds]


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


def parse_layers(text: str | None, n_layer: int) -> tuple[tuple[int, ...] | None, list[str]]:
    """ "0,1,3" -> (0, 1, 3); None for all layers; and sentences for what is wrong with it."""
    if text is None:
        return None, []
    words = text.split(",")
    if not all(_is_count(word) for word in words):
        return None, ["expected layer numbers separated by commas, such as 0,1,2,3"]
    layers = tuple(int(word) for word in words)
    outside = [layer for layer in layers if layer >= n_layer]
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    mistakes = [f"layer {', '.join(map(str, outside))} is outside 0..{n_layer - 1} (--n_layer {n_layer})"] if outside else []
    mistakes += [f"layer {', '.join(map(str, repeated))} is named more than once"] if repeated else []
    return layers, mistakes


def parse_counts(text: str | None) -> tuple[int, ...] | None:
    """The --moe_experts_by_layer of checked flags: "8,6" -> (8, 6)."""
    return None if text is None else tuple(int(word) for word in text.split(","))


def _check_experts_by_layer(flags: Flags, layers: int) -> list[str]:
    """`layers`: how many have experts."""
    if not all(_is_count(word) and int(word) >= 1 for word in flags.moe_experts_by_layer.split(",")):
        return ["expected numbers of experts separated by commas, such as 8,6,10,8"]
    counts = parse_counts(flags.moe_experts_by_layer)
    found = [] if len(counts) == layers else [f"{len(counts)} numbers for {layers} layers with experts"]
    found += [] if max(counts) == flags.moe_num_expert else [f"--moe_num_expert has to be the largest of them, {max(counts)}"]
    return found + ([] if flags.d_inner else ["needs --d_inner, the width of one expert"])


def _is_count(word: str) -> bool:
    return word.strip().isascii() and word.strip().isdigit()


def k_range(flags: Flags) -> tuple[int, int]:
    """k_min and k_max of the schedule: paper, E/2 and E."""
    E = flags.moe_num_expert
    low = max(1, E // 2) if flags.moe_top_k_min is None else flags.moe_top_k_min
    return low, E if flags.moe_top_k_max is None else flags.moe_top_k_max


def resolve(flags: Flags) -> Flags:
    """Every default that depends on another flag decided, so that config.json says what was run."""
    E = flags.moe_num_expert
    d_inner = flags.d_inner if flags.d_inner is not None else (flags.d_ff or 0) // (E if flags.moe else 1)
    changes: dict[str, Any] = {"d_inner": d_inner, "d_ff": d_inner * E if flags.moe else d_inner}
    changes["data"] = flags.data or f"data/{flags.dataset}"
    if flags.cuda:
        changes["device"] = "cuda"
    if flags.moe:
        router, implied = canonical_router(flags.gate_name)
        changes["gate_name"] = router
        if sorted(parse_layers(flags.moe_index, flags.n_layer)[0] or ()) == list(range(flags.n_layer)):
            changes["moe_index"] = None  # all layers, which is the default
        if set(parse_counts(flags.moe_experts_by_layer) or ()) == {E}:
            changes["moe_experts_by_layer"] = None  # they do not differ
        changes["load_balance"] = flags.load_balance if flags.load_balance is not None else implied.get("balance_loss")
        changes["moe_top_k_min"], changes["moe_top_k_max"] = k_range(flags)
        changes["moe_top_k"] = flags.moe_top_k if flags.moe_top_k is not None else max(1, E // 2)
        changes["dynamic_overall_steps"] = flags.max_step if flags.dynamic_overall_steps == -1 else flags.dynamic_overall_steps
    flags = dataclasses.replace(flags, **changes)
    if flags.method is None:
        flags = dataclasses.replace(flags, method=matching_method(flags))
    if flags.swad_end == -1:
        flags = dataclasses.replace(flags, swad_end=flags.max_step)
    if flags.work_dir is None:
        name = f"{flags.run_name or flags.method or 'custom'}-seed{flags.seed}"
        flags = dataclasses.replace(flags, work_dir=f"{flags.default_folder()}/{name}")
    return flags


def matching_method(flags: Flags) -> str | None:
    """The name of the first method in the registry that the official flags spell out, if one does."""
    for name in METHODS:
        wanted: Method = load(METHODS, "method", name)
        if all(getattr(flags, key) == value for key, value in wanted.flags.items()):
            return name
    return None


def usual_flags(flags: Flags) -> Flags:
    """What the preset and the method say."""
    meant = load(METHODS, "method", flags.method).flags if flags.method else {}
    return Flags(**{**PRESETS[flags.model][flags.preset], **meant, "model": flags.model, "preset": flags.preset, "method": flags.method})


def departures(flags: Flags, usual: Flags) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where decided flags depart from what the preset says, and where from what the method says: another row, or another table."""
    own = [field.name for field in dataclasses.fields(flags) if field.name not in (*OF_THE_RUN, *DERIVED)]
    found = {name: getattr(flags, name) for name in own if getattr(flags, name) != getattr(usual, name)}
    follows = resolve(dataclasses.replace(usual, **found, d_ff=flags.d_ff))
    found |= {name: getattr(flags, name) for name in DERIVED if getattr(flags, name) != getattr(follows, name)}
    if flags.d_ff != usual.d_ff:
        found["d_ff"] = flags.d_ff
    experts = {name: value for name, value in found.items() if name in (*OF_EXPERTS, "moe", "moe_num_expert", "d_inner")}
    found.pop("method_options", None)
    given = [
        (field.name, getattr(built, field.name), field.default) for built in built_options(flags) for field in dataclasses.fields(built)
    ]
    options = {name: value for name, value, default in given if value != default}
    of_method = (experts if flags.moe else {}) | {name: found[name] for name in found if name in OF_THE_START} | options
    return {name: value for name, value in found.items() if name not in (*experts, *OF_THE_START)}, of_method


def smoe_config(flags: Flags, method: Method | None = None) -> SMoEConfig:
    """The library's configuration of the experts, with the method's layer. ConfigError as there."""
    return SMoEConfig(
        num_experts=flags.moe_num_expert,
        top_k=flags.moe_top_k or max(1, flags.moe_num_expert // 2),
        d_expert=flags.d_inner,
        router=flags.gate_name,
        freeze_router=flags.freeze_gate,
        gate_weight=flags.gate_weight,
        output_scale=flags.output_scale,
        balance_loss=flags.load_balance,
        layers=parse_layers(flags.moe_index, flags.n_layer)[0],
        experts_by_layer=parse_counts(flags.moe_experts_by_layer),
        expert_rank=flags.moe_expert_rank,
        sparse_share=flags.moe_sparse_share,
        backend=flags.expert_backend,
        init_std=flags.init_std,
        method=method.name if method and method.layer else None,
        options=parse_options(flags.method_options),
    )


def top_k_schedule(flags: Flags) -> TopKSchedule | None:
    """k by step; None for a dense model."""
    if not flags.moe:
        return None
    if flags.dynamic_moe:
        return TopKSchedule(flags.dynamic_moe_mode, flags.moe_top_k_min, flags.moe_top_k_max, flags.dynamic_overall_steps, flags.seed)
    return TopKSchedule("constant", flags.moe_top_k, flags.moe_top_k, flags.max_step)


def last_top_k(flags: Flags) -> int | None:
    """k at the end of training, at which the weights are chosen by validation; None for a dense model."""
    schedule = top_k_schedule(flags)
    return schedule(flags.max_step) if schedule else None


def evaluation_ks(flags: Flags) -> list[int | None]:
    """k at which the final test is made: powers of two up to E, E/2 and E; [None], once, for a dense model."""
    if not flags.moe:
        return [None]
    E = flags.moe_num_expert
    return sorted({1 << power for power in range(E.bit_length()) if 1 << power <= E} | {max(1, E // 2), E})


def parse_ks(text: str, E: int) -> list[int | None]:
    """The --k of --eval_only. Raises UserError."""
    words = text.split(",")
    if not all(_is_count(word) and 1 <= int(word) <= E for word in words):
        raise UserError(f"--k {text}: expected numbers of active experts from 1 to {E}, separated by commas, such as 1,2,4")
    return [int(word) for word in words]


def read_config(folder: Path) -> dict[str, Any]:
    """The stored flags of a run. UserError if the folder holds none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no run: {path} is missing") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it is no JSON object; choose another --work_dir")
    return SINCE | config


if __name__ == "__main__":  # python -m utils.command_line ARGS...: checks a command line of train.py and prints what it decides
    with exit_on_user_error():
        print(json.dumps(dataclasses.asdict(parse()), indent=1))
