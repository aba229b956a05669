"""The identity of a run, as values: where it departs from preset and method, and what it started from. Imports no torch."""

import dataclasses
from typing import Any

from utils.checkpoints.origin import Source
from utils.data.corpus import Corpus
from utils.data.rows import Examples
from utils.data.tokenizer import Vocabulary
from utils.flags.derive import built_options, finetuning_k, method_flags, resolve, training_flags, usual_flags
from utils.flags.fields import FinetuneFlags, Flags, names
from utils.flags.presets import finetuning


def fingerprints(corpus: Corpus | Examples, vocabulary: Vocabulary | None, source: Source | None) -> dict[str, str]:
    """Hashes of the data, of the tokenizer's vocabulary, and of the weights a run starts from, as far as it has them."""
    found = {"data_fingerprint": corpus.fingerprint}
    found |= {"vocabulary_sha256": vocabulary.sha256} if vocabulary else {}
    return found | ({"checkpoint_sha256": source.fingerprint} if source else {})


def table_of(flags: Flags, source: Source | None) -> str:
    """The table that a run belongs to."""
    if isinstance(flags, FinetuneFlags):
        return "surgery" if source.surgery else "table2"
    return "surgery" if source else "table1"


def departures_of(flags: Flags, source: Source | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in which a run departs from its preset, and those in which it departs from its method."""
    if isinstance(flags, FinetuneFlags):
        return finetuning_departures(flags, source)
    return start_departures(flags, source) if source else departures(flags, usual_flags(flags))


def departures(flags: Flags, usual: Flags) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where decided flags depart from what the preset says, and where from what the method says: another row, or another table."""
    derived = names(role="derived")
    own = [field.name for field in dataclasses.fields(flags) if field.name not in (*names(role="run"), *derived)]
    found = {name: getattr(flags, name) for name in own if getattr(flags, name) != getattr(usual, name)}
    follows = resolve(dataclasses.replace(usual, **found, d_ff=flags.d_ff))
    found |= {name: getattr(flags, name) for name in derived if getattr(flags, name) != getattr(follows, name)}
    if flags.d_ff != usual.d_ff:
        found["d_ff"] = flags.d_ff
    experts = {name: value for name, value in found.items() if name in (*names(group="experts"), "d_inner")}
    found.pop("method_options", None)
    given = [
        (field.name, getattr(built, field.name), field.default) for built in built_options(flags) for field in dataclasses.fields(built)
    ]
    variants = names(role="variant")
    options = {name: value for name, value, default in given if value != default}
    of_method = (experts if flags.moe else {}) | {name: found[name] for name in found if name in variants} | options
    return {name: value for name, value in found.items() if name not in (*experts, *variants)}, of_method


def start_departures(flags: Flags, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a run departs from what its preset says, and where from what its method says, or did before."""
    operated = names(role="surgery") if source.surgery else ()
    made = {name: getattr(flags, name) for name in (*names(role="model"), "method", "moe", *operated)}
    usual = Flags(**{**training_flags(flags.model, flags.method, flags.preset), **made, "preset": flags.preset})
    of_preset, of_method = departures(flags, usual)
    taught = {"teacher_weight": flags.teacher_weight, "teacher_temperature": flags.teacher_temperature} if flags.teacher else {}
    return of_preset, of_method | taught


def finetuning_departures(flags: FinetuneFlags, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in which a run departs from its preset of fine-tuning, and from its method."""
    return departures(flags, _usual_flags(flags, source))


def training_of(source: Source) -> dict[str, Any]:
    """The first training of a checkpoint, before anything was done to its weights. A folder of weights alone is known by its name."""
    if "method" in source.trained or "folder" in source.trained:
        return source.trained
    made = source.made
    preset_settings, settings = departures(made, usual_flags(made))
    own = {"preset": made.preset, "preset_settings": preset_settings, "method": made.method or "custom", "settings": settings}
    return source.trained | own | {"seed": made.seed}


def provenance(source: Source, transferred: bool) -> dict[str, Any]:
    """The entry of a checkpoint in a record. transferred: whether its weights are used."""
    measured = {"surgery": source.surgery} if source.surgery else {}
    weights = {"operations": list(source.operations), "sha256": source.fingerprint, "transferred": transferred}
    return training_of(source) | weights | measured


def _usual_flags(flags: FinetuneFlags, source: Source) -> FinetuneFlags:
    """The flags of fine-tuning by preset, of the experts by method, and of the model by checkpoint."""
    made = ("dropout", "dropatt", "dynamic_moe_mode")
    sizes = {name: getattr(flags, name) for name in (*names(role="model"), "method", "moe")}
    sizes |= {name: source.flags.get(name, getattr(flags, name)) for name in made}
    values = {**method_flags(flags.method), **sizes, **{name: getattr(flags, name) for name in names(role="surgery")}}
    how = finetuning(flags.task, flags.preset, flags.model)
    return FinetuneFlags(**{**values, **how, **finetuning_k(values), "task": flags.task, "dataset": flags.task, "preset": flags.preset})
