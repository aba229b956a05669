"""Readable labels made from the values in a record, for tables, figures and file names. Nothing reads a label back."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from smoe_dropout.registry import METHODS, load
from utils.flags.models import MODELS

Record = dict[str, Any]

SCHEDULES = {
    "linear_increase": "k growing linearly",
    "linear_decrease": "k falling linearly",
    "cosine_increase": "k growing by a cosine",
    "exp_increase": "k growing exponentially",
    "multi_step_increase": "k growing in steps",
    "random": "k drawn at random",
}
# A phrase for each value of a setting; "" where another setting's phrase says it
PHRASES: dict[str, Callable[[Any], str]] = {
    "output_scale": lambda scale: "mean of experts" if scale == "mean" else "times E",
    "moe_top_k": lambda k: f"trained at k {k}",
    "moe_top_k_min": lambda k: f"k from {k}",
    "moe_top_k_max": lambda k: f"k to {k}",
    "dynamic_moe": lambda on: "k changing" if on else "constant k",
    "dynamic_moe_mode": lambda mode: SCHEDULES.get(mode, f"k {words(mode)}"),
    "moe_num_expert": lambda count: f"{count} experts",
    "moe_experts_by_layer": lambda counts: f"{counts.replace(',', ', ')} experts by layer",
    "moe_index": lambda layers: f"experts in layers {layers.replace(',', ', ')}",
    "dense_width": lambda width: "other layers as wide as all experts" if width == "all" else "other layers as wide as one expert",
    "gate_name": lambda name: f"{NAMES.get(name, words(name))} router",
    "freeze_gate": lambda frozen: "router frozen" if frozen else "router trained",
    "selection": lambda name: "S-BASE" if name == "sinkhorn" else f"selection by {words(name)}",
    "load_balance": lambda weight: f"load balance {weight:g}" if weight else "no load balance",
    "defaults": lambda which: f"{which} defaults",
    "from_scratch": lambda on: "from scratch" if on else "pre-trained",
    "moe_prune_to": lambda share: f"pruned to {share:g}",
    "n_layer": lambda count: f"{count} layers",
    "max_step": lambda count: f"{count:,} steps",
    "d_ff": lambda width: f"width {width}",
    "pooled": lambda _: "pooled over layers",
    "at_least": lambda count: f"at least {count} in each",
}
# operations and routers whose names in the literature are not words
NAMES = {"uncurl": "UNCURL", "reap": "REAP", "hc_smoe": "HC-SMoE"}
NAMES |= {"deepseek": "DeepSeek-V3", "sigma_moe": "sigma-MoE", "xmoe": "X-MoE", "remoe": "ReMoE", "adamoe": "AdaMoE", "top_p": "top-p"}
NAMES |= {"hyper_router": "hyper", "stable_moe": "StableMoE", "z_loss": "learned (z-loss)", "self_routing": "self"}


def words(name: str) -> str:
    """A name from the code as words."""
    return name.replace("_", " ")


def slug(text: str) -> str:
    """The text as part of a path: names from the code stay as they are (keep_best), other characters than letters and digits become "-"."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.")


def phrase(name: str, value: Any, tuned: int | None = None) -> str:
    """One setting in words. tuned: E of a model that is fine-tuned."""
    if name == "moe_top_k" and tuned:
        return f"k tuned at {'E/2' if value == tuned // 2 else value}"
    if value is None:
        return f"no {words(name)}"
    if name in PHRASES:
        return PHRASES[name](value)
    if isinstance(value, bool):
        return words(name) if value else f"no {words(name)}"
    return f"{words(name)} {value:g}" if isinstance(value, float) else f"{words(name)} {words(str(value))}"


def phrases(settings: dict[str, Any], tuned: int | None = None) -> list[str]:
    """All settings in words, in the order they are recorded in."""
    rest = dict(settings)
    if rest.get("dynamic_moe_mode") == "constant":  # its k is the end of the range that was given
        del rest["dynamic_moe_mode"]
        k = [rest.pop(name) for name in ("moe_top_k_min", "moe_top_k_max") if name in rest]
        return [f"constant k {k[0]}" if k else "constant k", *phrases(rest, tuned)]
    if "gate_name" in rest and rest.get("freeze_gate") is False:
        del rest["freeze_gate"]
        trained = "trained router" if rest["gate_name"] == "learned" else f"trained {phrase('gate_name', rest['gate_name'])}"
        return [trained if name == "gate_name" else phrase(name, value, tuned) for name, value in rest.items()]
    return [phrase(name, value, tuned) for name, value in rest.items()]


def method_title(name: str) -> str:
    """The title in the method's file; flags that match no method are "Custom"."""
    return load(METHODS, "method", name).title if name in METHODS else words(name).capitalize()


def method_label(record: Record, title: str | None = None) -> str:
    """The row of a run: its method, its settings, and those of the pre-training that are not its own. title: default the method's."""
    settings, start = record["settings"], record.get("pretrained", {})
    tuned = record["model"]["num_experts"] if record["table"] == "table2" else None
    before = {} if settings.get("from_scratch") else start.get("settings", {})
    inherited = {name: value for name, value in before.items() if name not in settings}
    other = {name: value for name, value in before.items() if settings.get(name, value) != value}
    told = [*phrases(settings, tuned), *phrases(inherited), *(f"{one} in pre-training" for one in phrases(other))]
    own = title or method_title(record["method"])
    own = own.replace(" (learned router)", "") if "gate_name" in settings else own
    return ", ".join([own, *told])


def preset_label(preset: str, settings: dict[str, Any]) -> str:
    return ", ".join([preset, *phrases(settings)])


def architecture_label(record: Record) -> list[str]:
    """The model, where a data set may be another's too: one of word pieces, or of a task."""
    name = record["model"]["architecture"]
    return [MODELS[name].title if name in MODELS else words(name)] if "pieces" in record["dataset"] or "pretrained" in record else []


def training_label(start: dict[str, Any]) -> str:
    """The training that a checkpoint comes from, and what was done to the weights afterwards."""
    if "folder" in start:
        return start["folder"]
    steps = f"step {start['checkpoint']:,} of {start['steps']:,}" if "checkpoint" in start else f"{start['steps']:,} steps"
    preset = preset_label(start["preset"], {k: v for k, v in start["preset_settings"].items() if k != "max_step"})
    done = operations_label(start.get("operations", ()))
    return ", ".join([start["dataset"].get("title") or start["dataset"]["name"], preset, steps, *([done] if done else [])])


def operations_label(operations: Iterable[dict[str, Any]]) -> str:
    """ "merge 16 to 8 + compress rank 16, pruned to 0.1 in 500 steps, taught" """
    text = ""
    for one in operations:
        joint = ", " if one["method"] == "train" else " + "
        text += f"{joint if text else ''}{_operation(one)}"
    return text


def _operation(one: dict[str, Any]) -> str:
    if "label" in one:  # version 0.1 recorded it as text
        return one["label"]
    if one["method"] == "train":
        steps = f"step {one['checkpoint']:,}" if "checkpoint" in one else f"{one['steps']:,} steps"
        by = f" by {one['pruned_by']}" if "pruned_by" in one else ""
        done = f"pruned to {one['pruned_to']:g}{by} in {steps}" if "pruned_to" in one else f"trained {steps}"
        return ", ".join([done, *phrases(one.get("settings", {})), *(["taught"] if one.get("taught") else [])])
    name = NAMES.get(one["method"], words(one["method"]))
    sizes = [f"{one['from']} to {one['keep']}"] if "keep" in one else []
    options = {name: value for name, value in one.get("options", {}).items() if name != "kept"}
    read = one.get("read") or {}
    task = [f"on {read['data']}"] if read.get("task") else []
    task += [f"without fold {read['fold']}"] if "fold" in read else []
    return " ".join([name, *sizes, *phrases(options), *task])
