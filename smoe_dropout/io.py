"""Self-describing weight folders, loaded strictly, and conversion from and to the official checkpoint format.

A folder holds `model.safetensors`, with tied tensors stored once, and `smoe_config.json`, which is absent for a dense model.
"""

import json
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.control import conversions
from smoe_dropout.options import ConfigError, build_options
from smoe_dropout.registry import ROUTERS, load

WEIGHTS, CONFIG = "model.safetensors", "smoe_config.json"

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
_OURS = {ours: official for official, ours in _OFFICIAL.items()}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state by name, contiguous and on the CPU; a tensor with several names only under the first."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if (identity := (tensor.data_ptr(), tensor.shape, tensor.stride())) not in seen or tensor.numel() == 0:
            seen.add(identity)
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def save_model(model: nn.Module, folder: str | Path) -> None:
    """Write the model's weights and configuration to the folder, creating it if needed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    if configs := conversions(model):
        texts = [config.to_json() for config in configs]
        (folder / CONFIG).write_text(texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]")
    save_file(stored_tensors(model), folder / WEIGHTS)


def load_weights(model: nn.Module, folder: str | Path) -> nn.Module:
    """Load a folder into a model of the same architecture and configuration, and return the model.

    Raises ConfigError, leaving the model untouched, for a missing or unexpected tensor, a different shape or dtype, a different
    configuration of the experts, or an unreadable file.
    """
    folder = Path(folder)
    _check_config(model, folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder / WEIGHTS} cannot be read: {error}") from None
    expected = stored_tensors(model)
    if tensors.keys() != expected.keys():
        missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise ConfigError(f"{folder / WEIGHTS} belongs to another model: missing {missing[:4]}, unexpected {foreign[:4]}")
    for name, tensor in tensors.items():
        found, wanted = (f"shape {tuple(t.shape)} of {t.dtype}" for t in (tensor, expected[name]))
        if found != wanted:
            raise ConfigError(f"{folder / WEIGHTS}: {name} has {found}, the model expects {wanted}")
    model.load_state_dict(tensors, strict=False)  # the names were compared above; tied tensors are stored once
    return model


def _check_config(model: nn.Module, folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: save_model(model, folder) writes one")
    ours, path = conversions(model), folder / CONFIG
    if path.exists() != bool(ours):
        raise ConfigError(
            f"{folder} holds a {'sparse' if path.exists() else 'dense'} model, but this one is {'sparse' if ours else 'dense'}"
        )
    if not ours:
        return
    try:
        found = json.loads(path.read_text())
        stored = [SMoEConfig.from_dict(values) for values in (found if isinstance(found, list) else [found])]
    except (TypeError, ValueError) as error:  # not JSON, or not a configuration
        raise ConfigError(f"{path} is damaged: {error}") from None
    if len(stored) != len(ours):
        raise ConfigError(f"{path} describes a model converted in {len(stored)} steps, but this one was in {len(ours)}")
    for theirs, own in zip(stored, ours, strict=True):
        _compare(theirs, own, path)


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
    routed = [build_options(kind, config.options, dict.fromkeys(config.options)) for config in (stored, ours)]
    if routed[0] != routed[1]:
        raise ConfigError(f"{path} has a router with {routed[0]}, but the model has {routed[1]}")


def from_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors from the official names and layouts to ours. ConfigError for a name that is not official."""
    return {_translate(name, _OFFICIAL): _transpose_down(name, tensor) for name, tensor in tensors.items()}


def to_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `from_official`."""
    translated = {name: _translate(name, _OURS) for name in tensors}
    return {translated[name]: _transpose_down(translated[name], tensor) for name, tensor in tensors.items()}


def _transpose_down(official_name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous() if official_name.endswith("experts.h4toh.weight") else tensor


def _translate(name: str, names: dict[str, str]) -> str:
    pattern = re.sub(r"^layers\.\d+\.", "layers.{}.", name)
    if pattern not in names:
        raise ConfigError(f"{name!r} is not a tensor of a Transformer-XL, so it cannot be converted")
    layer = re.match(r"layers\.(\d+)\.", name)
    return names[pattern].format(layer.group(1)) if layer else names[pattern]
