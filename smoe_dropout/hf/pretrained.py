"""Self-describing folders of transformers models with MoE layers, loaded strictly.

`save_pretrained` writes config.json, generation_config.json for generative models, the weights under a file name that transformers does not
look for, and finally a manifest with the sha256 of each file. `from_pretrained` reads such a folder, or one written by the Trainer or the
model's own save_pretrained, which has model.safetensors and no manifest.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.control import get_top_k, moe_layers
from smoe_dropout.conversion import moefy
from smoe_dropout.hf.described import NAME, Described, conversions_of, is_pretrained_model
from smoe_dropout.io import stored_tensors
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import METHODS, load

CONFIG, GENERATION, WEIGHTS, MANIFEST = "config.json", "generation_config.json", "experts.safetensors", "manifest.json"
THEIR_WEIGHTS, THEIR_INDEX = "model.safetensors", "model.safetensors.index.json"


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Write the model and its current k to the folder, creating it if needed; a folder written by this function is overwritten.

    An interrupted save leaves a folder that `from_pretrained` rejects. Raises ConfigError for a model without MoE layers or not from
    transformers, layers with different k, or a folder that holds another model.
    """
    folder, kind = Path(folder), type(model).__name__
    if not is_pretrained_model(model):
        raise ConfigError(f"{kind} is not a model of the transformers library: use smoe_dropout.save_model(model, folder)")
    if not moe_layers(model) or not isinstance(model.config, Described):
        raise ConfigError(f"{kind} was not converted by moefy: use its own model.save_pretrained(folder)")
    try:
        k = get_top_k(model)
    except ValueError as error:
        raise ConfigError(f"{kind} cannot be saved: {error}; call set_top_k(model, k) first") from None
    _refuse_foreign(folder)
    folder.mkdir(parents=True, exist_ok=True)
    room = Path(tempfile.mkdtemp(dir=folder, prefix=".saving-"))
    try:
        _write(model, k, room)
        names = sorted(path.name for path in room.iterdir())
        hashes = {name: _sha256(room / name) for name in names}
        _write_json(room / MANIFEST, {"complete": False})
        os.replace(room / MANIFEST, folder / MANIFEST)
        (folder / GENERATION).unlink(missing_ok=True)
        for name in names:
            os.replace(room / name, folder / name)
        _write_json(room / MANIFEST, {"complete": True, "sha256": hashes})
        os.replace(room / MANIFEST, folder / MANIFEST)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def from_pretrained(folder: str | Path, model_class: type | None = None) -> nn.Module:
    """Load the model of a folder bit for bit, with its precision, k and frozen routers, in evaluation mode.

    model_class: the model's class, if it is not part of transformers. Raises ConfigError, naming file and tensor, for a damaged or modified
    file, an interrupted save, and a tensor that is missing, unexpected, or of another shape or precision. Requires transformers.
    """
    folder = Path(folder)
    weights = _checked(folder)
    stored = _read_json(folder / CONFIG)
    if stored.get("model_type") != NAME:
        raise ConfigError(
            f"{folder / CONFIG} describes a {stored.get('model_type')!r} model without experts: use transformers' own from_pretrained, "
            "or load_weights for a folder of save_model"
        )
    try:
        if not (experts := conversions_of(stored)):
            raise ValueError(f"no {NAME!r} in it")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG} is damaged: {error}") from None
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{weights} cannot be read: {error}") from None
    with torch.random.fork_rng(devices=[]):  # the model is built on the CPU
        model = _build(folder / CONFIG, stored, experts, model_class)
    _fill(model, tensors, weights)
    if (folder / GENERATION).exists() and model.can_generate():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model.eval()


def _write(model: nn.Module, k: int, room: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    stored = getattr(config, NAME)
    for entry in stored if isinstance(stored, list) else [stored]:
        entry["top_k"] = min(k, entry["num_experts"])
    config.to_json_file(room / CONFIG)
    if model.can_generate():
        model.generation_config.save_pretrained(room)
    save_file(stored_tensors(model), room / WEIGHTS)
    for path in room.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _refuse_foreign(folder: Path) -> None:
    """Raise ConfigError if writing would overwrite files of another origin, or leave another model's weights beside ours."""
    theirs = [name for name in (THEIR_WEIGHTS, THEIR_INDEX) if (folder / name).exists()]
    if not (folder / MANIFEST).exists():
        theirs += [name for name in (CONFIG, GENERATION, WEIGHTS) if (folder / name).exists()]
    elif "complete" not in _read_json(folder / MANIFEST):
        theirs.append(MANIFEST)
    if theirs:
        raise ConfigError(f"{folder} holds {', '.join(theirs)} of another model: choose a new folder, or remove them first")


def _checked(folder: Path) -> Path:
    """Verify the folder against its manifest, if it has one, and return the path of its weights."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: save_pretrained(model, folder) writes one")
    if not (folder / MANIFEST).exists():
        if (folder / THEIR_INDEX).exists():
            raise ConfigError(f"{folder / THEIR_INDEX}: weights split over several files are not supported; use {NAME}.save_pretrained")
        found = folder / THEIR_WEIGHTS
        if not found.exists():
            raise ConfigError(f"{folder} has neither {MANIFEST} nor {THEIR_WEIGHTS}: an interrupted save, or not a model folder")
        return found
    manifest = _read_json(folder / MANIFEST)
    if (
        manifest.get("complete") is not True
        or not isinstance(hashes := manifest.get("sha256"), dict)
        or not {CONFIG, WEIGHTS} <= set(hashes)
    ):
        raise ConfigError(f"{folder / MANIFEST} does not describe a complete save: save again")
    if foreign := [name for name in (GENERATION, THEIR_WEIGHTS, THEIR_INDEX) if name not in hashes and (folder / name).exists()]:
        raise ConfigError(f"{folder / foreign[0]} is not part of the save: remove it")
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name} is missing")
        if _sha256(folder / name) != expected:
            raise ConfigError(f"{folder / name} is damaged or modified: its sha256 differs from {MANIFEST}")
    return folder / WEIGHTS


def _build(path: Path, stored: dict[str, Any], conversions: list[SMoEConfig], model_class: type | None) -> nn.Module:
    """Build a model as described in config.json, in its precision."""
    import transformers

    host, names = stored.get("host_model_type"), stored.get("architectures") or [None]
    kind = model_class or getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(f"{path}: {names[0]!r} is not a model of transformers: pass yours as from_pretrained(folder, model_class=...)")
    config_class = kind.config_class if kind.config_class and kind.config_class.model_type == host else None
    if config_class is None:
        raise ConfigError(f"{path} describes a {host!r} model, but {kind.__name__} is not one")
    try:
        config = config_class.from_dict(getattr(config_class, "_decode_special_floats", dict)(stored["host"]))
        model = kind._from_config(config, **_attention_of(conversions))
        for experts in conversions:
            moefy(model, experts)
        return model
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # transformers raises many kinds: missing values, wrong types, values that contradict each other
        raise ConfigError(f"{path} does not describe a valid {kind.__name__}: {error}") from error


def _attention_of(conversions: list[SMoEConfig]) -> dict[str, str]:
    """The eager implementation if a layer needs attention probabilities; config.json does not store the implementation."""
    kinds = [load(METHODS, "method", experts.method).layer for experts in conversions if experts.method]
    return {"attn_implementation": "eager"} if any(kind and "probabilities" in kind.needs for kind in kinds) else {}


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the tensors into the model. A tied tensor may have any of its names; precisions of model and configuration are accepted."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    missing = [tied[0] for tied in names.values() if not any(name in tensors for name in tied)]
    foreign = sorted(tensors.keys() - state.keys())
    if missing or foreign:
        raise ConfigError(f"{path} belongs to another model: missing {missing[:4]}, unexpected {foreign[:4]}")
    for name, tensor in tensors.items():
        allowed = {state[name].dtype, model.config.dtype if state[name].is_floating_point() else state[name].dtype}
        if tensor.shape != state[name].shape or tensor.dtype not in allowed:
            found, wanted = (f"shape {tuple(t.shape)} of {t.dtype}" for t in (tensor, state[name]))
            raise ConfigError(f"{path}: {name} has {found}, the model expects {wanted}")
        first = next(twin for twin in names[id(state[name])] if twin in tensors)
        if first != name and not torch.equal(tensors[first], tensor):
            raise ConfigError(f"{path}: {name} and {first} are the same tensor in the model, but differ in the file")
    for name, tensor in tensors.items():
        state[name].data = tensor.to(state[name].device)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: not a JSON object")
    return found


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
