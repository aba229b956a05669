"""Folders of transformers models with experts: they describe themselves, and are loaded strictly.

`save_pretrained` writes config.json, generation_config.json where the model generates, the weights under a name that transformers does not
look for, and last a manifest with the sha256 of each. `from_pretrained` reads such a folder, and besides one that transformers wrote: a
checkpoint of the Trainer, or of the model's own save_pretrained, which has model.safetensors and no manifest.
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
from smoe_dropout.hf.adopt import NAME, Described, is_pretrained_model
from smoe_dropout.io import stored_tensors
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import METHODS, load

CONFIG, GENERATION, WEIGHTS, MANIFEST = "config.json", "generation_config.json", "experts.safetensors", "manifest.json"
THEIR_WEIGHTS, THEIR_INDEX = "model.safetensors", "model.safetensors.index.json"


def save_pretrained(model: nn.Module, folder: str | Path) -> None:
    """Writes the folder, made if it is not there; one that this function wrote is overwritten. The current k is stored.

    An interrupted save leaves a folder that `from_pretrained` refuses. ConfigError for a model without MoE layers, or not of transformers,
    for layers of different k, or a folder that holds another model.
    """
    folder, kind = Path(folder), type(model).__name__
    if not is_pretrained_model(model):
        raise ConfigError(f"{kind} is not a model of the transformers library: use smoe_dropout.save_model(model, folder)")
    if not moe_layers(model) or not isinstance(model.config, Described):
        raise ConfigError(f"{kind} has no MoE layers of moefy: use its own model.save_pretrained(folder)")
    try:
        k = get_top_k(model)
    except ValueError as error:
        raise ConfigError(f"{kind} cannot be saved: {error}; set_top_k(model, k) makes them alike") from None
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
    """The model of a folder, in evaluation mode, bit for bit: precision, k and frozen routers included.

    model_class: for a class that is not in transformers itself. ConfigError, naming file and tensor, for a damaged or altered file, a save
    that was interrupted, and a tensor that is missing, foreign, misshapen or of another precision. Needs the transformers library.
    """
    folder = Path(folder)
    weights = _checked(folder)
    told = _read_json(folder / CONFIG)
    if told.get("model_type") != NAME:
        raise ConfigError(
            f"{folder / CONFIG} is of a {told.get('model_type')!r} model without experts: use transformers' own from_pretrained for it, "
            "or load_weights for a folder of save_model"
        )
    try:
        experts = SMoEConfig.from_dict(told.pop(NAME))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / CONFIG} is damaged: {error}") from None
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{weights} cannot be read: {error}") from None
    with torch.random.fork_rng(devices=[]):  # it is built on the CPU
        model = _built(folder / CONFIG, told, experts, model_class)
    _fill(model, tensors, weights)
    if (folder / GENERATION).exists() and model.can_generate():
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    return model.eval()


def _write(model: nn.Module, k: int, room: Path) -> None:
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
    getattr(config, NAME)["top_k"] = k
    config.to_json_file(room / CONFIG)
    if model.can_generate():
        model.generation_config.save_pretrained(room)
    save_file(stored_tensors(model), room / WEIGHTS)
    for path in room.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _refuse_foreign(folder: Path) -> None:
    """ConfigError where writing would destroy what this library did not write, or leave another model's weights beside ours."""
    theirs = [name for name in (THEIR_WEIGHTS, THEIR_INDEX) if (folder / name).exists()]
    if not (folder / MANIFEST).exists():
        theirs += [name for name in (CONFIG, GENERATION, WEIGHTS) if (folder / name).exists()]
    elif "complete" not in _read_json(folder / MANIFEST):
        theirs.append(MANIFEST)
    if theirs:
        raise ConfigError(f"{folder} holds {', '.join(theirs)} of another model: choose a new folder, or remove them first")


def _checked(folder: Path) -> Path:
    """The file of the weights, once every file of the folder has the sha256 that it was written with, where that is known."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: save_pretrained(model, folder) writes one")
    if not (folder / MANIFEST).exists():
        if (folder / THEIR_INDEX).exists():
            raise ConfigError(f"{folder / THEIR_INDEX}: weights in several files cannot be read; save with save_pretrained of {NAME}")
        found = folder / THEIR_WEIGHTS
        if not found.exists():
            raise ConfigError(f"{folder} has neither {MANIFEST} nor {THEIR_WEIGHTS}: its save was interrupted, or it is no model's folder")
        return found
    manifest = _read_json(folder / MANIFEST)
    if (
        manifest.get("complete") is not True
        or not isinstance(hashes := manifest.get("sha256"), dict)
        or not {CONFIG, WEIGHTS} <= set(hashes)
    ):
        raise ConfigError(f"{folder / MANIFEST} lists no complete save: it was interrupted, save again")
    if foreign := [name for name in (GENERATION, THEIR_WEIGHTS, THEIR_INDEX) if name not in hashes and (folder / name).exists()]:
        raise ConfigError(f"{folder / foreign[0]} was not written with the rest of the folder: remove it")
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise ConfigError(f"{folder / name} is missing")
        if _sha256(folder / name) != expected:
            raise ConfigError(f"{folder / name} is damaged, or was changed: its sha256 is not the one in {MANIFEST}")
    return folder / WEIGHTS


def _built(path: Path, told: dict[str, Any], experts: SMoEConfig, model_class: type | None) -> nn.Module:
    """A new model as config.json tells, in its precision."""
    import transformers

    from smoe_dropout.conversion import moefy

    host, names = told.get("host_model_type"), told.get("architectures") or [None]
    kind = model_class or getattr(transformers, str(names[0]), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(f"{path}: {names[0]!r} is no model of transformers: from_pretrained(folder, model_class=...) takes yours")
    config_class = kind.config_class if kind.config_class and kind.config_class.model_type == host else None
    if config_class is None:
        raise ConfigError(f"{path} is of a {host!r} model, and {kind.__name__} is not")
    try:
        config = config_class.from_dict(getattr(config_class, "_decode_special_floats", dict)(told["host"]))
        model = kind._from_config(config, **_attention_of(experts))
        return moefy(model, experts)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except Exception as error:  # of many kinds: a value that is missing, of another type, or impossible together with others
        raise ConfigError(f"{path} gives no model {kind.__name__}: {error}") from error


def _attention_of(experts: SMoEConfig) -> dict[str, str]:
    """The plain implementation where a layer looks at its probabilities; config.json does not tell it."""
    layer = load(METHODS, "method", experts.method).layer if experts.method else None
    return {"attn_implementation": "eager"} if layer and "probabilities" in layer.needs else {}


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Puts the tensors in, each under any of the names of a tied one. Allowed precisions are the model's and that of its configuration."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    missing = [tied[0] for tied in names.values() if not any(name in tensors for name in tied)]
    foreign = sorted(tensors.keys() - state.keys())
    if missing or foreign:
        raise ConfigError(f"{path} is of another model: missing {missing[:4]}, foreign {foreign[:4]}")
    for name, tensor in tensors.items():
        allowed = {state[name].dtype, model.config.dtype if state[name].is_floating_point() else state[name].dtype}
        if tensor.shape != state[name].shape or tensor.dtype not in allowed:
            found, wanted = (f"shape {tuple(t.shape)} of {t.dtype}" for t in (tensor, state[name]))
            raise ConfigError(f"{path}: {name} has {found}, the model wants {wanted}")
        first = next(twin for twin in names[id(state[name])] if twin in tensors)
        if first != name and not torch.equal(tensors[first], tensor):
            raise ConfigError(f"{path}: {name} and {first} are one tensor of the model, and differ")
    for name, tensor in tensors.items():
        state[name].data = tensor.to(state[name].device)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: it is no JSON object")
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
