"""Loading of models with experts by transformers' own `from_pretrained`, and the strict checks around it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto import modeling_auto

from smoe_dropout.control import moe_layers
from smoe_dropout.conversion import ConversionWarning, install
from smoe_dropout.files import read_object
from smoe_dropout.hf.described import Conversion, placed_conversions, plain
from smoe_dropout.hf.folder import CONFIG, HUB, OLD_WEIGHTS, Files
from smoe_dropout.layer import STATE_OF_K, without_k
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import METHODS
from smoe_dropout.registry import load as registered

CACHE_LINE = 64  # bytes
PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # names in safetensors


def read_config(source: str | Path, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model's configuration, and the arguments that do not concern it."""
    if kwargs.get("config") is not None:
        return kwargs["config"], {name: value for name, value in kwargs.items() if name != "config"}
    dtypes = {name: kwargs[name] for name in ("dtype", "torch_dtype") if name in kwargs}
    hub = {name: kwargs[name] for name in HUB if name in kwargs}
    refuse_other_weights(kwargs)
    asked = {"trust_remote_code": False} | {name: value for name, value in kwargs.items() if value != "auto"}
    if (path := Path(source, kwargs.get("subfolder") or "", CONFIG)).is_file():
        read_object(path)  # with its limits, which transformers does not have
    try:
        config, unused = transformers.AutoConfig.from_pretrained(source, return_unused_kwargs=True, **asked)
    except ConfigError as error:
        raise ConfigError(f"{Path(source) / CONFIG}: {error}") from None
    except Exception as error:
        if not Path(source).is_dir():
            raise ConfigError(f"{source} is neither a folder nor a model of the hub that can be read: {_line(error)}") from None
        Files(source, kwargs)  # raises if the fault is not in the configuration
        # transformers raises many kinds: missing values, wrong types, values that contradict each other
        raise ConfigError(f"{Path(source) / CONFIG} does not describe a valid model: {_line(error)}") from error
    return config, unused | hub | dtypes


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def converting(host: type) -> type:
    """Subclass of a model class whose call builds the host and converts it as its configuration says. The result is of the host's class."""

    def build(kind: type, config: Any, *args: Any, **kwargs: Any) -> nn.Module:
        hosts_own, described = plain(config), placed_conversions(config)
        if hosts_own._attn_implementation is None and any(map(needs_probabilities, described)):
            hosts_own._attn_implementation = "eager"
        model = host(hosts_own, *args, **kwargs)
        with default_dtype(torch.float32), warnings.catch_warnings():  # in the precision of the first conversion, which has warned
            warnings.simplefilter("ignore", ConversionWarning)
            for module, conversion in described:
                install(model.get_submodule(module), conversion, cuts=False)
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), rf"(^|\.){STATE_OF_K}$"}
        kind.frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        return model

    return type(host.__name__, (host,), {"__new__": build, "__module__": host.__module__})


def needs_probabilities(conversion: Conversion) -> bool:
    """Return whether a layer needs attention probabilities; config.json does not store the implementation of attention."""
    method = conversion.config.method and registered(METHODS, "method", conversion.config.method)
    return bool(method and method.layer and "probabilities" in method.layer.needs)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default precision, and restore it on exit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load(from_pretrained: Callable, kind: type, source: Any, *args: Any, config: Any, **kwargs: Any) -> Any:
    """Load a model of class `kind` with the experts that `config` describes, and check that it is whole.

    from_pretrained: that of PreTrainedModel, without `guards`. Raises ConfigError, naming file and tensor, for a damaged or modified file,
    an interrupted save, and a tensor that is missing, unexpected or of another shape. If the folder was saved from another class with the
    same body, tensors that only one of the two has are allowed, as in transformers.
    """
    if kwargs.get("quantization_config") is not None or getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"quantization_config: transformers would quantise the attention of {source} but not its experts; load it without"
        )
    refuse_other_weights(kwargs)
    if not belongs(kind, config):
        raise ConfigError(f"{source} has a {config.model_type!r} model, but {kind.__name__} is not one")
    files, building = Files(source, kwargs), converting(kind)
    allowed, with_info = kwargs.pop("ignore_mismatched_sizes", False), kwargs.pop("output_loading_info", False)
    if files.weights == OLD_WEIGHTS:
        config.transformers_weights = OLD_WEIGHTS
    with files.verified(), without_k():
        try:
            named = {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True, **kwargs}
            model, info = from_pretrained(building, source, *args, **named)
        except ConfigError as error:
            raise ConfigError(f"{files.path(CONFIG)}: {error}") from None
        except SafetensorError as error:
            raise ConfigError(files.unreadable() or f"{files.path(files.weights)} cannot be read: {error}") from None
        except Exception as error:
            if fault := files.unreadable():
                raise ConfigError(fault) from None
            if fault := unbuildable(kind, config):
                raise ConfigError(f"{files.path(CONFIG)}: a {kind.__name__} cannot be built from it: {fault}") from error
            raise
        refuse_incomplete(model, kind, config, info, files, allowed)
    for part in model.modules():
        if isinstance(own := getattr(part, "config", None), transformers.PreTrainedConfig):
            vars(own).pop("transformers_weights", None)
    chosen = kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto"
    restore(model, building.frozen, files.dtypes() if chosen == "auto" else {})
    return (model, info) if with_info else model


def refuse_other_weights(kwargs: dict[str, Any]) -> None:
    """Raise ConfigError for arguments by which transformers would read other weights than those that are verified."""
    asked = [name for name in ("variant", "gguf_file") if kwargs.get(name) is not None]
    if asked or kwargs.get("use_safetensors") is False:
        raise ConfigError(f"{(asked or ['use_safetensors'])[0]}: a model with experts is loaded from its safetensors files only")


def unbuildable(kind: type, config: Any) -> str | None:
    """Fault of a configuration of which no model can be built, such as a size that is none; None if that is possible."""
    try:
        with torch.device("meta"):
            converting(kind)(config)
    except Exception as error:  # of any kind: transformers and torch raise what they come upon
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None


def belongs(kind: type, config: Any) -> bool:
    """Return whether a model class takes this configuration: its own, or that of an architecture for which transformers uses it."""
    if kind.config_class is None or isinstance(config, kind.config_class):
        return True
    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    return any(kind.__name__ in (names if isinstance(names := table.get(config.model_type, ()), tuple) else (names,)) for table in tables)


def refuse_incomplete(model: nn.Module, kind: type, config: Any, info: dict[str, Any], files: Files, other_sizes: bool) -> None:
    """Raise ConfigError if tensors were missing, unexpected or of other shapes."""
    of_experts = tuple(f"{name}." for name, _ in moe_layers(model))
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    if kind.__name__ not in (config.architectures or [kind.__name__]):
        stored = _names(config)
        missing = {name for name in missing if name.startswith(of_experts) or _bare(model, name) in stored}
        unexpected = {name for name in unexpected if _bare(model, name) not in stored}
    if missing or unexpected:
        one = min(unexpected or missing)
        raise ConfigError(
            f"{files.where(one)} belongs to another model: missing {sorted(missing)[:4]}, unexpected {sorted(unexpected)[:4]}"
        )
    for name, found, wanted in info["mismatched_keys"]:
        if name.startswith(of_experts) or not other_sizes:
            remedy = "" if name.startswith(of_experts) else "; ignore_mismatched_sizes=True makes it a fresh one"
            raise ConfigError(f"{files.where(name)}: {name} has shape {tuple(found)}, the model expects {tuple(wanted)}{remedy}")
    if problems := [*info.get("error_msgs", []), *info.get("conversion_errors", {}).values()]:
        raise ConfigError(f"{files.path(files.weights)} cannot be loaded: {problems[0]}")


def _names(config: Any) -> set[str]:
    """Names of the tensors of the class that the folder was saved from, without the prefix of the body; empty if it is not known."""
    kind = getattr(transformers, config.architectures[0], None)
    if kind is None:
        return set()
    with torch.device("meta"):
        saved = converting(kind)(config)
    return {_bare(saved, name) for name in saved.state_dict()}


def _bare(model: nn.Module, name: str) -> str:
    return name.removeprefix(f"{model.base_model_prefix}.")


def restore(model: nn.Module, frozen: set[str], stored: dict[str, str]) -> None:
    """Give the parameters of MoE layers what transformers does not keep: frozen ones, and the precision in the file.

    stored: name of the precision by name of the tensor; empty if the user chose another precision.
    """
    for prefix, layer in moe_layers(model):
        experts = {id(parameter) for parameter in layer.experts.parameters()}  # their precision is the model's
        for name, parameter in layer.named_parameters(prefix):
            parameter.requires_grad_(name not in frozen)
            if id(parameter) in experts:
                align(parameter)
                continue
            kept = stored.get(name) or stored.get(_bare(model, name)) or stored.get(f"{model.base_model_prefix}.{name}")
            if (dtype := PRECISIONS.get(kept)) not in (None, parameter.dtype):
                parameter.data = parameter.data.to(dtype)


def align(parameter: nn.Parameter) -> None:
    """Move a parameter to where a cache line begins. In the file, which is mapped into memory, a tensor may begin anywhere, and products of
    a single position then read the experts at half the speed.
    """
    if parameter.is_cpu and type(parameter.data) is torch.Tensor and parameter.data_ptr() % CACHE_LINE:
        parameter.data = parameter.data.clone()
