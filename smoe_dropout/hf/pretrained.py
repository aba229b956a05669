"""Self-describing folders of transformers models with MoE layers, loaded strictly.

A folder holds what transformers writes, in its format, and a manifest with the sha256 of each file. The configuration names this library as
the model type, so that transformers builds the experts, or nothing.
"""

from pathlib import Path
from typing import Any

import transformers
from torch import Tensor, distributed, nn
from transformers.utils import hf_api

from smoe_dropout.arguments import boolean
from smoe_dropout.arguments import path as checked_path
from smoe_dropout.control import moe_layers
from smoe_dropout.files import read_object
from smoe_dropout.hf.described import Described, is_pretrained_model
from smoe_dropout.hf.folder import CONFIG, is_part
from smoe_dropout.hf.loading import read_config
from smoe_dropout.hf.saving import describe_for_saving
from smoe_dropout.manifest import MANIFEST, hashes, publish, room
from smoe_dropout.options import ConfigError

UPLOAD = ("repo_id", "private", "token", "revision", "commit_message", "create_pr")


def save_pretrained(model: nn.Module, folder: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
    """Write the model and the k of every layer to the folder, creating it if needed; a folder written by this function is overwritten.

    push_to_hub: upload the files to the repository `repo_id`, by default of the folder's name, with `private`, `token`, `revision`,
    `commit_message` and `create_pr` as in transformers. kwargs: those of transformers' save_pretrained, such as max_shard_size. Of several
    processes the first one writes; all must call this if the model's tensors are distributed over them. An interrupted save leaves a folder
    that `from_pretrained` rejects. k is what `set_top_k` has set. Raises ConfigError for a model without MoE layers or not from
    transformers, or a folder that holds another model.
    """
    folder, kind, push_to_hub = checked_path("folder", folder), type(model).__name__, boolean("push_to_hub", push_to_hub)
    if not is_pretrained_model(model):
        raise ConfigError(f"{kind} is not a model of the transformers library: use smoe_dropout.save_model(model, folder)")
    if not moe_layers(model):
        raise ConfigError(f"{kind} was not converted by moefy: use its own model.save_pretrained(folder)")
    hub = {name: kwargs.pop(name) for name in UPLOAD if name in kwargs}
    describe_for_saving(model)
    earlier, first = _earlier(folder), not _distributed() or distributed.get_rank() == 0
    if sharded := any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        kwargs["state_dict"] = whole_tensors(model, first)
    if first:
        with room(folder) as made:
            model.save_pretrained(made, **kwargs)
            publish(made, folder, earlier)
        if push_to_hub:
            _upload(folder, **hub)
    if sharded:
        distributed.barrier()


def _upload(folder: Path, repo_id: str | None = None, private: bool | None = None, token: Any = None, **commit: Any) -> None:
    """Upload the files of a save to a repository of the hub, which is made if needed."""
    repository = hf_api().create_repo(repo_id or folder.resolve().name, private=private, token=token, exist_ok=True).repo_id
    files = [*hashes(folder / MANIFEST), MANIFEST]
    hf_api().upload_folder(repo_id=repository, folder_path=folder, allow_patterns=files, token=token, **commit)


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def whole_tensors(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """State of a sharded model on the CPU, gathered from all processes, each of which must call this; empty unless `keep`."""
    found: dict[int, Tensor] = {}
    state = model.state_dict(keep_vars=True)
    for tensor in state.values():
        if id(tensor) not in found:  # a tensor with several names is one
            gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            found[id(tensor)] = gathered.detach().cpu() if keep else gathered.new_empty(0)
    return {name: found[id(tensor)] for name, tensor in state.items()} if keep else {}


def from_pretrained(source: str | Path, model_class: type | None = None, **kwargs: Any) -> Any:
    """Load a saved model bit for bit, with its precision, k and frozen routers, in evaluation mode.

    source: a folder, or the id of a repository of the hub. model_class: class or auto class of the model, if it is not the one that was
    saved. kwargs: those of transformers' from_pretrained, such as dtype, device_map, revision, or changes of the configuration. Raises
    ConfigError, naming file and tensor, for a damaged or modified file, an interrupted save, and a tensor that is missing, unexpected or of
    another shape. Requires transformers.
    """
    path = checked_path("source", source)
    if model_class is not None and not isinstance(model_class, type):
        raise ConfigError(f"model_class = {model_class!r} must be a class, such as transformers.AutoModelForCausalLM")
    if not path.is_dir() and (isinstance(source, Path) or path.is_absolute() or len(path.parts) > 2):
        raise ConfigError(f"{source} is not a folder: save_pretrained(model, folder) writes one")
    config, kwargs = read_config(source, kwargs)
    if not isinstance(config, Described):
        raise ConfigError(
            f"{path / CONFIG} describes a {config.model_type!r} model without experts: use transformers' own from_pretrained, or "
            "load_weights for a folder of save_model"
        )
    if model_class is None:
        named = config.architectures[0] if isinstance(config.architectures, list) and config.architectures else None
        model_class = getattr(transformers, str(named), None)
        if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
            raise ConfigError(
                f"{path / CONFIG}: {named!r} is not a model of transformers: pass yours as from_pretrained(folder, model_class=...)"
            )
    return model_class.from_pretrained(source, config=config, **kwargs)


def _earlier(folder: Path) -> list[str]:
    """Files of an earlier save in the folder. ConfigError if it holds files of another origin."""
    theirs = [path.name for path in folder.iterdir() if is_part(path.name)] if folder.is_dir() else []
    stored = read_object(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    if stored is None:
        earlier: list[str] = []
    elif stored.get("complete") is False:  # interrupted
        earlier = theirs
    elif "complete" in stored and CONFIG in (names := hashes(folder / MANIFEST)):
        earlier = [*names]
    else:
        earlier, theirs = [], [*theirs, MANIFEST]
    if foreign := sorted(set(theirs) - set(earlier)):
        raise ConfigError(f"{folder} holds {', '.join(foreign)} of another model: choose a new folder, or remove them first")
    return earlier
