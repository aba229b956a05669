"""Self-slimmable inference: models that share the weights of another and activate fewer experts, and copies."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import boolean
from smoe_dropout.control import default_k, moe_layers, set_top_k
from smoe_dropout.experts.int8 import Int8Experts
from smoe_dropout.options import ConfigError

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def slim(model: nn.Module, k: int | Sequence[int] | Mapping[str, int], dtype: torch.dtype | None = None, copy: bool = False) -> nn.Module:
    """View of the model with k active experts in its MoE layers, in evaluation mode and without gradients. The model is not changed.

    This is the paper's self-slimmable inference: time and active parameters decrease with k. A view has modules, settings and state of its
    own, so that it runs in a thread while the model or another view runs in another, and it is saved as a model of its own. Its weights and
    buffers are those of the model: it costs hardly any memory and follows changes in place, as by an optimiser or load_state_dict, and
    loading weights into it changes the model. It does not follow where the model gets other tensors, as by `model.to(dtype)`, to another
    device, load_state_dict with assign=True, or surgery: make the view again.

    k: as in `set_top_k`. copy: True copies the weights, and so does a floating-point dtype: the precision of all weights except those that
    determine the routing, whose rounding could change which experts are chosen. torch.int8: of the experts' maps only, by `Int8Experts`.
    All experts are kept; `operate` removes some. Raises ConfigError as in `set_top_k`, for any other dtype, for trained parameters of a
    class of their own, such as those of quantisation, and for a model wrapped by DistributedDataParallel or FSDP.
    """
    if dtype not in (None, torch.int8) and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype = {dtype!r} must be a floating-point dtype, such as torch.bfloat16, torch.int8 for the experts, or None")
    shares = not boolean("copy", copy) and dtype in (None, torch.int8)
    default_k(model, k)  # raises before anything is copied
    if wrapper := next((kind for part in model.modules() for kind in type(part).__mro__ if kind.__name__ in WRAPPERS), None):
        raise ConfigError(f"{wrapper.__name__} wraps the model and cannot be copied: slim the model before it is wrapped")
    slimmed = deepcopy(model, {id(tensor): shared(tensor) for tensor in tensors(model)} if shares else {}).eval().requires_grad_(False)
    set_top_k(slimmed, k)
    if dtype == torch.int8:
        for _, layer in moe_layers(slimmed):
            layer.experts = Int8Experts(layer.experts)
    elif dtype is not None:
        layers = [layer for _, layer in moe_layers(slimmed)]
        routers = [deepcopy(layer.router) for layer in layers]
        routing = [(parameter, parameter.data) for layer in layers for parameter in layer.routing_parameters()]
        slimmed.to(dtype)
        for layer, router in zip(layers, routers, strict=True):
            layer.router, router.shared = router, layer.shared
        for parameter, values in routing:
            parameter.data = values
    return slimmed


def tensors(model: nn.Module) -> Iterator[Tensor]:
    """All tensors that a model holds, each once: parameters, buffers, and those in attributes, such as lists of them."""
    waiting, seen = [model], set()
    while waiting:
        if id(value := waiting.pop()) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, nn.Module):
            waiting.append(vars(value))
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set):
            waiting.extend(value)


def shared(tensor: Tensor) -> Tensor:
    """The tensor, or a parameter without gradient of the same storage. ConfigError for a trained parameter of a class of its own."""
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach() if tensor.requires_grad else tensor
    if nn.Parameter in type(tensor).__mro__[1:]:  # as of libraries for quantisation
        if tensor.requires_grad:
            raise ConfigError(f"a parameter of the model is a {type(tensor).__name__}, which cannot be shared: use slim(..., copy=True)")
        return tensor
    alias = nn.Parameter(tensor.detach(), requires_grad=False)
    if type(tensor) is nn.Parameter:
        vars(alias).update(vars(tensor))
    return alias
