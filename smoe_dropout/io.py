"""Self-describing weight folders, loaded strictly, and conversion from and to the official checkpoint format.

A folder holds `model.safetensors`, with tied tensors stored once, `smoe_config.json`, which is absent for a dense model, and a manifest.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smoe_dropout import arguments
from smoe_dropout.config import SMoEConfig, read_configs
from smoe_dropout.control import conversions, converted_together, moe_layers, places, set_top_k
from smoe_dropout.files import read_object, writing_tensors
from smoe_dropout.layer import STATE_OF_K, without_k
from smoe_dropout.manifest import MANIFEST, hashes, publish, room, verified
from smoe_dropout.options import ConfigError, build_options
from smoe_dropout.registry import ROUTERS, load

WEIGHTS, CONFIG = "model.safetensors", "smoe_config.json"
STATE = "state.json"  # of a run's checkpoint, whose manifest is the run's own and is verified by it

# official name -> ours, for a Transformer-XL; `{}` is the layer. Official experts store the second map as [E, D, H], ours as [E, H, D]
_OFFICIAL = {
    "word_emb.emb_layers.0.weight": "embedding.weight",
    "crit.out_layers.0.bias": "head.bias",
    "crit.out_layers.0.weight": "head.weight",
    "r_w_bias": "content_bias",
    "r_r_bias": "position_bias",
    "layers.{}.dec_attn.qkv_net.weight": "layers.{}.attention.qkv.weight",
    "layers.{}.dec_attn.r_net.weight": "layers.{}.attention.position.weight",
    "layers.{}.dec_attn.o_net.weight": "layers.{}.attention.out.weight",
    "layers.{}.dec_attn.layer_norm.weight": "layers.{}.attention_norm.weight",
    "layers.{}.dec_attn.layer_norm.bias": "layers.{}.attention_norm.bias",
    "layers.{}.pos_ff.layer_norm.weight": "layers.{}.feed_forward_norm.weight",
    "layers.{}.pos_ff.layer_norm.bias": "layers.{}.feed_forward_norm.bias",
    "layers.{}.pos_ff.CoreNet.0.weight": "layers.{}.feed_forward.core.0.weight",
    "layers.{}.pos_ff.CoreNet.0.bias": "layers.{}.feed_forward.core.0.bias",
    "layers.{}.pos_ff.CoreNet.3.weight": "layers.{}.feed_forward.core.3.weight",
    "layers.{}.pos_ff.CoreNet.3.bias": "layers.{}.feed_forward.core.3.bias",
    "layers.{}.pos_ff.gate.gate.weight": "layers.{}.feed_forward.core.router.weight",
    "layers.{}.pos_ff.gate.gate.bias": "layers.{}.feed_forward.core.router.bias",
    "layers.{}.pos_ff.experts.htoh4.weight": "layers.{}.feed_forward.core.experts.up",
    "layers.{}.pos_ff.experts.htoh4.bias": "layers.{}.feed_forward.core.experts.bias_up",
    "layers.{}.pos_ff.experts.h4toh.weight": "layers.{}.feed_forward.core.experts.down",
    "layers.{}.pos_ff.experts.h4toh.bias": "layers.{}.feed_forward.core.experts.bias_down",
}
_CLUSTERED = {  # of a Transformer-XL with adaptive embedding and softmax; `{}` is the cluster
    "word_emb.emb_layers.{}.weight": "embedding.tables.{}",
    "word_emb.emb_projs.{}": "embedding.projections.{}",
    "crit.out_layers.{}.weight": "head.tables.{}",
    "crit.out_layers.{}.bias": "head.biases.{}",
    "crit.out_projs.{}": "head.projections.{}",
    "crit.cluster_weight": "head.cluster_weight",
    "crit.cluster_bias": "head.cluster_bias",
}
_OURS = {ours: official for official, ours in (_OFFICIAL | _CLUSTERED).items()}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and buffers by name, contiguous and on the CPU; a tensor with several names only under the first."""
    return {name: tensor.cpu().contiguous() for name, tensor in _named_once(model).items()}


def _named_once(model: nn.Module) -> dict[str, Tensor]:
    tensors, seen = {}, set()
    with without_k():
        state = model.state_dict()
    for name, tensor in state.items():
        if (identity := (tensor.data_ptr(), tensor.shape, tensor.stride())) not in seen or tensor.numel() == 0:
            seen.add(identity)
            tensors[name] = tensor.detach()
    return tensors


def save_model(model: nn.Module, folder: str | Path, manifest: bool = True) -> None:
    """Write the model's weights and configuration to the folder, creating it if needed; an earlier save by this function is overwritten.

    The configuration has the k of every layer that `set_top_k` has set. An interrupted save leaves the folder as it was, or one that
    `load_weights` rejects. manifest: False writes straight to the folder and no manifest, for a caller that does both. Raises ConfigError
    for a model without values, on the meta device, and for a folder of another kind; OSError if the files cannot be written.
    """
    arguments.require_weights(model)
    folder = arguments.path("folder", folder)
    if not manifest:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        return _write(model, folder)
    if (folder / MANIFEST).exists() and not _is_ours(stored := read_object(folder / MANIFEST)):
        kind = "a model of save_pretrained" if "complete" in stored else f"another {MANIFEST}"
        raise ConfigError(f"{folder} holds {kind}: choose a new folder, or remove it first")
    with room(folder) as made:
        _write(model, made)
        publish(made, folder, (CONFIG, WEIGHTS))


def _is_ours(stored: Mapping[str, object]) -> bool:
    """Return whether a manifest is that of `save_model`, or of an interrupted save."""
    names = stored.get("sha256", {})
    return "complete" in stored and isinstance(names, dict) and names.keys() <= {CONFIG, WEIGHTS}


def _write(model: nn.Module, folder: Path) -> None:
    if configs := conversions(model):
        texts = [config.to_json() for config in configs]
        (folder / CONFIG).write_text(texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]")
    with writing_tensors(folder / WEIGHTS):
        save_file(stored_tensors(model), folder / WEIGHTS)


def load_weights(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load a folder into a model of the same architecture and configuration, and return the model.

    Sets k, also by layer, to what it was when the model was saved; folders of version 0.1 have the k of the conversion. Raises
    ConfigError, leaving the model untouched, for a missing or unexpected tensor, a different shape or dtype, a different configuration of
    the experts, an unreadable file, an interrupted save, and a file that differs from the manifest. A checkpoint of a run has a manifest of
    its own, which is not read here; folders of version 0.1 have none.
    """
    arguments.require_weights(model)
    folder = arguments.path("folder", folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: save_model(model, folder) writes one")
    with verified(_hashes(folder), folder, lambda name: folder / name if (folder / name).is_file() else None):
        ks, tensors = _fitting(model, folder)
    model.load_state_dict(tensors, strict=False)  # the names were compared; tied tensors are stored once
    if ks:
        set_top_k(model, ks)
    return model


def _hashes(folder: Path) -> dict[str, str]:
    path = folder / MANIFEST
    if (folder / STATE).exists() or not path.exists():
        return {}
    found = hashes(path)
    if WEIGHTS not in found:
        raise ConfigError(f"{path} does not list {WEIGHTS}: this is not a folder of save_model")
    if (folder / CONFIG).exists() and CONFIG not in found:
        raise ConfigError(f"{folder / CONFIG} is not part of the save: remove it")
    return found


def _fitting(model: nn.Module, folder: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The k of a folder by name of the layer, and its tensors. ConfigError unless they are those of this model."""
    ks = _check_config(model, folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, ValueError, KeyError) as error:  # KeyError: a precision that torch does not have
        raise ConfigError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    expected = _named_once(model)
    if tensors.keys() != expected.keys():
        missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise ConfigError(f"{folder / WEIGHTS} belongs to another model: missing {missing[:4]}, unexpected {foreign[:4]}")
    for name, tensor in tensors.items():
        found, wanted = (f"shape {tuple(t.shape)} of {t.dtype}" for t in (tensor, expected[name]))
        if found != wanted:
            raise ConfigError(f"{folder / WEIGHTS}: {name} has {found}, the model expects {wanted}")
    return ks, tensors


def _check_config(model: nn.Module, folder: Path) -> dict[str, int]:
    """k of each MoE layer by its name. ConfigError if the experts are configured differently."""
    ours, path = conversions(model), folder / CONFIG
    if path.exists() != bool(ours):
        raise ConfigError(
            f"{folder} holds a {'sparse' if path.exists() else 'dense'} model, but this one is {'sparse' if ours else 'dense'}"
        )
    if not ours:
        return {}
    stored = read_configs(path)
    if len(stored) != len(ours):
        raise ConfigError(f"{path} describes a model converted in {len(stored)} steps, but this one was in {len(ours)}")
    names, ks = {layer: name for name, layer in moe_layers(model)}, {}
    for theirs, own, layers in zip(stored, ours, converted_together(model), strict=True):
        _compare(theirs, own, path)
        its_places = places(layers)
        if theirs.top_k_by_layer is not None and len(theirs.top_k_by_layer) <= max(its_places):
            raise ConfigError(f"{path} has top_k_by_layer = {theirs.top_k_by_layer}, but the model has {len(layers)} MoE layers")
        ks |= {names[layer]: theirs.of_layer(place).top_k for layer, place in zip(layers, its_places, strict=True)}
    return ks


def _compare(stored: SMoEConfig, ours: SMoEConfig, path: Path) -> None:
    for name in (
        "num_experts",
        "experts_by_layer",
        "router",
        "gate_weight",
        "output_scale",
        "method",
        "expert_rank",
        "sparse_share",
        "adopted",
    ):
        if getattr(stored, name) != getattr(ours, name):
            raise ConfigError(f"{path} has {name} = {getattr(stored, name)!r}, but the model has {getattr(ours, name)!r}")
    kind = load(ROUTERS, "router", ours.router).Options
    try:
        routed = [build_options(kind, config.options, dict.fromkeys(config.options)) for config in (stored, ours)]
    except ConfigError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    if routed[0] != routed[1]:
        raise ConfigError(f"{path} has a router with {routed[0]}, but the model has {routed[1]}")


def from_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors from the official names and layouts to ours. ConfigError for a name that is not official."""
    _require_tensors(tensors)
    names = _OFFICIAL | (_CLUSTERED if "crit.cluster_weight" in tensors else {})
    return {_translate(name, names): _transpose_down(name, tensor) for name, tensor in tensors.items()}


def to_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `from_official`. A state_dict's k is left out: the official format has none."""
    _require_tensors(tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(STATE_OF_K)}
    translated = {name: _translate(name, _OURS) for name in tensors}
    return {translated[name]: _transpose_down(translated[name], tensor) for name, tensor in tensors.items()}


def _require_tensors(tensors: object) -> None:
    if not isinstance(tensors, Mapping):
        raise ConfigError(f"tensors is a {type(tensors).__name__}, not a dict of tensors by name")
    if wrong := [name for name, tensor in tensors.items() if not isinstance(name, str) or not isinstance(tensor, Tensor)]:
        raise ConfigError(f"the entry {wrong[0]!r} is not a tensor with a name")
    if flat := [name for name, tensor in tensors.items() if name.endswith(("htoh4.weight", "h4toh.weight", ".down")) and tensor.dim() != 3]:
        raise ConfigError(f"{flat[0]} has shape {tuple(tensors[flat[0]].shape)}, but maps of experts are stacked: [E, H, D]")


def _transpose_down(official_name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous() if official_name.endswith("experts.h4toh.weight") else tensor


def _translate(name: str, names: dict[str, str]) -> str:
    number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
    pattern = f"{name[: number.start()]}{{}}{name[number.end() :]}" if number else name
    if pattern in names:
        return names[pattern].format(number and number.group())
    if name not in names:
        raise ConfigError(f"{name!r} is not a tensor of a Transformer-XL, so it cannot be converted")
    return names[name]
