"""The record of a finished run, result.json: everything that a table or a figure needs, as values; utils.reporting makes the labels."""

from typing import Any

from torch import nn

from smoe_dropout import moe_layers
from utils.flags.derive import parse_layers
from utils.flags.fields import Flags
from utils.models.flops import parameter_counts
from utils.models.registry import architecture
from utils.tasks.base import Metric
from utils.training.identity import departures_of, table_of
from utils.training.record_schema import COMPLETE, SCHEMA
from utils.training.run import Run


def build_result(
    run: Run,
    model: nn.Module,
    quality: list[dict],
    training: dict[str, float],
    routing: dict[str, Any] | None,
    metrics: list[dict],
    environment: dict,
    peak_memory_mib: float,
    best_step: int,
    argv: list[str],
) -> dict[str, Any]:
    """The record of one run. `training`: steps, tokens, seconds, cpu_seconds, tokens_per_second, flops."""
    flags, task, corpus = run.flags, run.task, run.task.corpus
    preset_settings, settings = departures_of(flags, run.source)
    sparse = moe_layers(model)
    return {
        "schema": SCHEMA,
        "status": COMPLETE,
        "table": table_of(flags, run.source),
        "method": flags.method or "custom",
        "settings": settings,
        "sparse": bool(sparse),
        "preset": flags.preset,
        "preset_settings": preset_settings,
        "dataset": {
            "name": corpus.name,
            "title": corpus.title,
            "fingerprint": corpus.fingerprint,
            corpus.unit: corpus.sizes,
            **({"note": corpus.notes} if corpus.notes else {}),
        },
        "metric": {
            "name": task.metric.name,
            "lower_is_better": task.metric.lower_is_better,
            "split": task.splits[-1],
            "training": task.metric.in_training,
        },
        **({"attack": {"kind": flags.attack, "rate": flags.attack_rate}} if flags.attack else {}),
        **run.provenance(),
        "seed": flags.seed,
        "model": {
            "architecture": flags.model,
            **{name: getattr(flags, name) for name in architecture(flags.model).SIZES},
            "num_experts": flags.moe_num_expert if sparse else None,
            **({"experts_by_layer": [layer.num_experts for _, layer in sparse]} if flags.moe_experts_by_layer else {}),
            "moe_layers": moe_layer_indices(flags) if sparse else [],
            "router": flags.gate_name if sparse else None,
        },
        "parameters": parameter_counts(model),
        "quality": quality,
        "best_step": best_step,
        "training": training,
        "routing": routing,
        "peak_memory_mib": round(peak_memory_mib, 1),
        "curve": curve(metrics, task.metric),
        "environment": environment,
        "argv": argv,
    }


def moe_layer_indices(flags: Flags) -> list[int]:
    """The layers with experts, of a model that has some."""
    return list(parse_layers(flags.moe_index, flags.n_layer)[0] or range(flags.n_layer))


def curve(metrics: list[dict], metric: Metric) -> dict[str, list]:
    """train: [step, quality or loss, k, lr]; valid: [step, {k or "dense": quality}]."""
    train = [[line["step"], line[metric.in_training], line.get("k"), line["lr"]] for line in metrics if line["split"] == "train"]
    valid = [[line["step"], by_k(line, metric.name)] for line in metrics if line["split"] != "train"]
    return {"train": train, "valid": valid}


def by_k(line: dict[str, Any], metric: str) -> dict[str, float]:
    """The metric_k8, metric_k16 ... (or metric) of a validation line as {"8": .., "16": ..} (or {"dense": ..})."""
    if metric in line:
        return {"dense": line[metric]}
    return {name.removeprefix(f"{metric}_k"): value for name, value in line.items() if name.startswith(f"{metric}_k")}
