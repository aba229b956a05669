"""Linear maps of every kind that a feed-forward network is made of, as weights [out, in] of plain tensors."""

from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Map(NamedTuple):
    """y = W x + b: weight [out, in], bias [out], and whether it acts on dimension 1 instead of the last, as convolutions do."""

    weight: Tensor
    bias: Tensor | None
    channels_first: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """(in, out)."""
        return self.weight.shape[1], self.weight.shape[0]


def linear_map(module: nn.Module) -> Map | None:
    """The map that the module computes, or None if it is not one or `obstacle` says why it cannot be used."""
    if obstacle(module) is not None:
        return None
    if isinstance(module, nn.Linear):
        return Map(module.weight, module.bias)
    if type(module).__name__ == "Conv1D":  # transformers' GPT-2 map, whose weight is [in, out]
        return Map(module.weight.t(), module.bias)
    return Map(module.weight.flatten(1), module.bias, True) if _is_pointwise(module) else None


def obstacle(module: nn.Module) -> str | None:
    """Reason why a module that stands for a linear map cannot become experts, with the remedy; None for any other module."""
    if is_adapted(module):
        return "carries an adapter: convert the model before adding adapters, or merge them first (peft: merge_and_unload)"
    sized = isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D" and not _is_pointwise(module):
        if sized and (callable(weight) or any("weight" in name for name in (*module._buffers, *module._parameters))):
            return f"is a {type(module).__name__}, which is not plain: convert the model before quantising it, or dequantise it first"
        return None
    if derived := [name for name, child in module.named_children() if name == "parametrizations" and child is not None]:
        names = sorted(name for name, _ in getattr(module, derived[0]).named_parameters())
        return f"is computed from {', '.join(names)}: remove the parametrization first"
    if extra := sorted(set(module._parameters) - {"weight", "bias"}):
        return f"is computed from {', '.join(extra)}: remove the parametrization first"
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or type(weight).__module__.split(".")[0] != "torch":
        return f"is quantised ({type(module).__name__}): convert the model before quantising it, or dequantise it first"
    if module._modules or not _computes(module):
        return f"is a {type(module).__name__} that computes more than W x + b"
    return None


def is_adapted(module: nn.Module) -> bool:
    """Return whether the module wraps a linear map and adds to it, as the adapters of peft do."""
    base = getattr(module, "base_layer", None)
    return isinstance(base, nn.Module) and (stands_for_map(base))


def stands_for_map(module: nn.Module) -> bool:
    """Return whether the module is a linear map, usable or not."""
    return obstacle(module) is not None or linear_map(module) is not None


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a module that stands for a linear map, if it tells."""
    if is_adapted(module):
        return sizes_of(module.base_layer)
    if (found := linear_map(module)) is not None:
        return found.sizes
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return sizes if None not in sizes and stands_for_map(module) else None


def _is_pointwise(module: nn.Module) -> bool:
    """Return whether this is a convolution that mixes no positions."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d) or module.groups != 1 or isinstance(module.padding, str):
        return False
    return not any(size != 1 for size in (*module.kernel_size, *module.stride)) and not any(module.padding)


def _computes(module: nn.Module) -> bool:
    """Return whether forward is W x + b, tried with small weights if the class has a forward of its own."""
    kind = type(module)
    if "forward" in vars(module) and "_old_forward" not in vars(module):  # accelerate's hooks keep the original there
        return False
    if kind.forward in (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward):
        return True
    if module._forward_hooks or module._forward_pre_hooks or _is_pointwise(module):
        return False
    own = frozenset((name, value) for name, value in vars(module).items() if name not in _PLAIN and isinstance(value, Hashable))
    return _computes_small(kind, module.bias is None, own)


_PLAIN = {*vars(nn.Linear(1, 1, device="meta")), "nx", "nf", "forward", "_old_forward"}


@lru_cache(maxsize=256)
def _computes_small(kind: type, without_bias: bool, own: frozenset) -> bool:
    draw, conv1d = torch.Generator().manual_seed(0), kind.__name__ == "Conv1D"
    weight, bias = (torch.randn(size, generator=draw, dtype=torch.float32, device="cpu") for size in ((6, 5), (6,)))
    bias = None if without_bias else bias
    small = object.__new__(kind)
    nn.Module.__init__(small)
    for name, value in (*own, *({"nx": 5, "nf": 6} if conv1d else {"in_features": 5, "out_features": 6}).items()):
        small.__dict__[name] = value
    small.weight = nn.Parameter(weight.t().contiguous() if conv1d else weight, False)
    small.register_parameter("bias", None if bias is None else nn.Parameter(bias, False))
    x = torch.randn((2, 3, 5), generator=draw, dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            y = small(x)
    except Exception:  # a forward that needs more than a weight is not a plain linear map
        return False
    return isinstance(y, Tensor) and y.shape == (2, 3, 6) and torch.allclose(y, F.linear(x, weight, bias), rtol=1e-4, atol=1e-5)
