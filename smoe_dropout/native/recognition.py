"""Recognition of what a native block computes, by numbers: it runs on random inputs and weights, and an MoE layer must give the same.

The block's own settings, such as `routed_scaling_factor`, are only hints for what to try. The experts are made a few hidden units wide
for the trial, so that its cost does not depend on theirs; the block itself, which may be on the meta device, is not changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.native.blocks import Parts, parts_of
from smoe_dropout.native.layer import Layout, read, shared_output, within_capacity
from smoe_dropout.routers.scored import ScoredRouter

TOLERANCE = 1e-5  # relative error; float32 rounding gives about 1e-6
SEEDS = (0, 1)  # a second trial decides where rounding may have chosen between experts with almost equal scores
NEAR, NEARLY = 0.98, "it computes almost"
HIDDEN = 8  # hidden units of an expert in a trial
TOKENS = (64, 8)  # sequences, positions: enough that rules which choose alike for most tokens are told apart

# settings by which blocks of transformers name what they do
TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "moe_k")
IMPLEMENTATION = "_experts_implementation_internal"  # of a configuration: how its experts are computed
GROUPS, TOP_GROUPS = ("n_group", "num_group", "n_groups", "num_groups"), ("topk_group", "top_k_group", "topk_groups")


class Native(NamedTuple):
    """A recognised block. k: its own number of active experts. options: of the router and the layer. dropout: of the hidden units."""

    parts: Parts
    layout: Layout
    k: int
    options: dict[str, Any]
    dropout: float


class Trial(NamedTuple):
    """A pass of a block: input [B, T, D], its tensors by name, k, output minus that of the shared part [N, D]."""

    x: Tensor
    tensors: Mapping[str, Tensor]
    k: int
    routed_ND: Tensor


def recognise(block: nn.Module) -> Native | str:
    """Recognise what the block computes. Returns a sentence if it is not what an MoE layer computes."""
    parts = parts_of(block)
    if isinstance(parts, str):
        return parts
    if parts.others:
        return f"it has {parts.others[0]!r} besides its experts, router and shared experts"
    shared = dict(block.named_children())
    gates = [name for name in parts.shared if [len(p) for p in shared[name].parameters()] in ([1], [1, 1])]
    if len(parts.shared) - len(gates) > 1 or len(gates) > 1:
        return f"it has the parts {', '.join(map(repr, parts.shared))} besides its experts and router"
    parts = parts._replace(shared=(*(name for name in parts.shared if name not in gates), *gates))
    dropouts = {module.p for name in _names(parts) for module in block.get_submodule(name).modules() if isinstance(module, nn.Dropout)}
    if len(dropouts) > 1:
        return f"its experts have several dropouts: {sorted(dropouts)}"
    faults = []
    for seed, layout in itertools.product(SEEDS, _layouts(block, parts)):
        if seed and not any(fault.startswith(NEARLY) for fault in faults):
            break
        found = _matched(block, parts, layout, seed)
        if not isinstance(found, str):
            layout, k, options = found
            if jitter := max((value for name, value in _own_settings(block) if "jitter" in name and isinstance(value, float)), default=0.0):
                options["jitter"] = jitter
            return Native(parts, layout, k, options, dropouts.pop() if dropouts else 0.0)
        faults.append(found)
    faults.sort(key=lambda fault: fault.startswith("it fails"))
    return faults[0] if faults else "its experts' maps do not compose to D -> H -> D"


def _names(parts: Parts) -> set[str]:
    """Modules that hold experts."""
    return {name.partition(".")[0] for stack in parts.maps for name in stack}


def _layouts(block: nn.Module, parts: Parts) -> Iterator[Layout]:
    """Ways in which the shapes of the maps can be read; the activation is found later."""
    shapes = [tuple(block.get_parameter(stack[0]).shape)[-2:] for stack in parts.maps]
    D = block.get_parameter(parts.router).shape[1]
    for order in itertools.permutations(range(len(shapes))):
        if len(order) == 3 and order[0] > order[1]:
            continue  # gate and up in the order of their declaration first; the other order is tried with it
        for into, out in itertools.product((False, True), (True, False)):
            turned = [shapes[place][::-1] if into else shapes[place] for place in order[:-1]]
            down = shapes[order[-1]][::-1] if out else shapes[order[-1]]
            if len(order) not in (2, 3) or down[1] != D or any(shape[1] != D for shape in turned):
                continue
            rows = sum(shape[0] for shape in turned)
            if rows in (down[0], 2 * down[0]):
                width = rows // down[0]
                orders = [order] if len(order) == 2 else [order, (order[1], order[0], order[2])]
                for one, interleaved in itertools.product(orders, (False, True) if width == 2 and len(order) == 2 else (False,)):
                    yield Layout(one, into, out, interleaved, width == 2)


def _matched(block: nn.Module, parts: Parts, layout: Layout, seed: int) -> tuple[Layout, int, dict[str, Any]] | str:
    """The layout with its activation, k and options with which an MoE layer computes what the block does."""
    own_k = next((value for name, value in _settings(block) if name in TOP_K and isinstance(value, int)), 1)
    ks = [own_k]
    if any(name in TOP_K for module in block.modules() for name in vars(module)):
        ks += [k for k in (1, 3) if k != own_k and k <= parts.num_experts]
    trials, (tensors, x) = [], _drawn(block, parts, layout, seed)
    for k in ks:
        trial = _tried(block, parts, tensors, x, k)
        if isinstance(trial, str):
            return trial
        trials.append(trial)
    most = 0.0
    for name in _activations(block, parts, layout.gated):
        experts = _experts(trials[0], parts, layout._replace(activation=name))
        for options in _candidates(block, parts):
            agreement = 1.0
            for trial in trials:
                agreement = min(agreement, _agreement(trial, parts, experts, options))
                if agreement < NEAR:
                    break
            most = max(most, agreement)
            if agreement == 1:
                layout = layout._replace(activation=name)
                if "capacity" in options:
                    options["capacity"] = _capacity(block)
                return layout, own_k, {**options, "precision": _precision(block, parts, trials[0])}
    if most >= NEAR:
        return f"{NEARLY} what an MoE layer does, but for {1 - most:.1%} of random inputs something else"
    return (
        "on random inputs it computes something other than its shared experts plus a sum of its chosen experts weighted by softmax or "
        "sigmoid scores (another score, a scaled input, an activation that experts do not support, a norm or a latent map)"
    )


def _activations(block: nn.Module, parts: Parts, gated: bool) -> list[str]:
    """Names of the activations to try: those that a module of the experts computes, or all if there is no such module."""
    x_N = torch.linspace(-3, 3, 50)
    plain = [module for name in _names(parts) for module in block.get_submodule(name).modules() if not list(module.parameters())]
    computed = []
    for module in plain:
        with suppress(Exception), torch.no_grad():  # a module that is no activation
            computed.append(module(x_N))

    def hinted(name: str) -> bool:
        y_N = ACTIVATIONS[name.removesuffix("_gated")].apply(x_N)
        return any(isinstance(own, Tensor) and own.shape == y_N.shape and torch.allclose(own, y_N, atol=1e-6) for own in computed)

    names = [name for name, activation in ACTIVATIONS.items() if activation.width == 1 + gated]
    return [name for name in names if hinted(name)] or names


def _candidates(block: nn.Module, parts: Parts) -> Iterator[dict[str, Any]]:
    """Options of a router and a layer that the block's settings suggest."""
    settings = list(_settings(block))
    own = [value for name, value in _own_settings(block) if "scal" in name]
    own += [value for name, value in settings if "scal" in name and "rout" in name]
    scales = list(dict.fromkeys([*(float(value) for value in own if isinstance(value, float | int) and value > 0), 1.0]))
    groups: list[dict[str, Any]] = [{}]
    G, top = (next((value for name, value in settings if name in names and isinstance(value, int)), 1) for names in (GROUPS, TOP_GROUPS))
    if 0 < top < G and parts.num_experts % G == 0:
        groups = [*({"groups": G, "top_groups": top, "group_best": best} for best in (1, 2)), *groups]
    vectors: list[dict[str, Any]] = [{"bias": False}]
    if len(parts.vectors) == 1:
        vectors = [{"bias": False, "correction": True}, {"bias": True}]
    elif parts.vectors:
        vectors = [{"bias": True, "correction": True}]
    capacities = [{}] if _capacity(block) is None else [{"capacity": 1}, {}]
    rules = itertools.product(("softmax", "sigmoid"), (True, False), scales, groups, vectors, capacities)
    for score, normalise, scale, grouped, vector, capacity in rules:
        yield {"score": score, "normalise": normalise, "scale": scale, **grouped, **vector, **capacity}


def _capacity(block: nn.Module) -> int | None:
    return next((value for name, value in _own_settings(block) if "capacity" in name and isinstance(value, int)), None)


def _own_settings(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and values of the attributes of the block's modules, without truth values."""
    for module in block.modules():
        yield from ((name, value) for name, value in vars(module).items() if not isinstance(value, bool))


def _settings(block: nn.Module) -> Iterator[tuple[str, Any]]:
    """The same, and after them those of the modules' configurations."""
    yield from _own_settings(block)
    for module in block.modules():
        if hasattr(config := getattr(module, "config", None), "__dict__"):
            yield from ((name, value) for name, value in vars(config).items() if not isinstance(value, bool))


def _tried(block: nn.Module, parts: Parts, tensors: Mapping[str, Tensor], x: Tensor, k: int) -> Trial | str:
    """A pass of the block, or a sentence why it fails."""
    try:
        with _evaluated(block, k), torch.no_grad(), torch.random.fork_rng(devices=[]):
            y = torch.func.functional_call(block, tensors, (x.clone(),))
            if not isinstance(y, Tensor) or y.shape != x.shape:
                return f"it returns {'a tuple' if isinstance(y, tuple) else 'another shape'} instead of one tensor shaped as its input"
            if parts.shared:
                y = y - shared_output(x, [_called(block, name, tensors) for name in parts.shared])
    except Exception as error:  # a block that needs other inputs, or weights of another layout
        return f"it fails on an input of shape {tuple(x.shape)}: {' '.join(str(error).split())[:160]}"
    return Trial(x, tensors, k, y.flatten(0, 1))


def _called(block: nn.Module, name: str, tensors: Mapping[str, Tensor]):
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    return lambda x: torch.func.functional_call(block.get_submodule(name), own, (x,))


def _drawn(block: nn.Module, parts: Parts, layout: Layout, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random tensors for the block, its experts and shared experts `HIDDEN` units wide, and an input."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    D = block.get_parameter(parts.router).shape[1]
    width = 1 + layout.gated if len(layout.order) == 2 else 1
    for position, place in enumerate(layout.order):
        last = position == len(layout.order) - 1
        for stacks, vector in ((parts.maps, False), (parts.biases, True)):
            for name in stacks[place] if stacks else ():
                units = HIDDEN * (1 if last else width)
                shape = [D] if last and vector else [units] if vector else [units, D]
                if not vector and (layout.out_transposed if last else layout.into_transposed):
                    shape.reverse()
                if len(parts.maps[place]) == 1:
                    shape.insert(0, parts.num_experts)
                tensors[name] = torch.randn(shape, generator=draw) / (HIDDEN if last else D) ** 0.5
    inside = [parameter for name in parts.shared[:1] for parameter in block.get_submodule(name).parameters() if parameter.dim() > 1]
    widths = sorted({size for parameter in inside for size in parameter.shape} - {D})
    narrow = {size: HIDDEN * size // widths[0] for size in widths if size > HIDDEN and size % widths[0] == 0}
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        if name not in tensors and tensor.is_floating_point():
            shape = tensor.shape if name.partition(".")[0] not in parts.shared else [narrow.get(size, size) for size in tensor.shape]
            spread = 2.0 if name == parts.router else 1.0
            spread *= max(shape[-1], 1) ** -0.5 if tensor.dim() > 1 and name not in parts.vectors else 0.3
            tensors[name] = torch.randn(shape, generator=draw) * spread
    return tensors, torch.randn(*TOKENS, D, generator=draw)


def _experts(trial: Trial, parts: Parts, layout: Layout) -> Experts:
    """The experts of a trial."""
    tensors = read(parts, layout, trial.tensors)
    E, H, D = tensors.down.shape
    with torch.device("meta"):
        experts = Experts(E, D, H, layout.activation, 0.0, "sorted", 0.02)
    for name, tensor in tensors._asdict().items():
        zeros = torch.zeros(getattr(experts, name).shape) if tensor is None else tensor
        setattr(experts, name, nn.Parameter(zeros, requires_grad=False))
    return experts


@torch.no_grad()
def _agreement(trial: Trial, parts: Parts, experts: Experts, options: Mapping[str, Any]) -> float:
    """Fraction of tokens for which an MoE layer with this router computes what the block did; that of a few of them if it is small.

    1 if the router's groups have fewer than the trial's k experts, for which blocks define nothing.
    """
    if trial.k > options.get("top_groups", parts.num_experts) * parts.num_experts // options.get("groups", 1):
        return 1.0
    routed = {name: value for name, value in options.items() if name != "capacity"}
    E, D = trial.tensors[parts.router].shape
    with torch.device("meta"):
        router = ScoredRouter(D, SMoEConfig(num_experts=E, top_k=trial.k, router="scored", options=routed)).eval()
    router.weight = nn.Parameter(trial.tensors[parts.router])
    if router.group is not None:
        router.group = torch.arange(E) * router.options.groups // E
    for name, vector in zip([name for name in ("bias", "correction") if routed.get(name)], parts.vectors, strict=True):
        values = trial.tensors[vector].flatten()
        setattr(router, name, nn.Parameter(values) if name == "bias" else values)
    positions = trial.x.shape[1]
    for sequences in (slice(2), slice(None)):
        x_ND, routed_ND = trial.x[sequences].flatten(0, 1), trial.routed_ND.unflatten(0, (-1, positions))[sequences].flatten(0, 1)
        indices_NK, weights_NK, *_ = router(x_ND, trial.k)
        if "capacity" in options:
            weights_NK = weights_NK * within_capacity(indices_NK, positions, E, options["capacity"])
        expected_ND = experts(x_ND, indices_NK, weights_NK)
        scale = trial.routed_ND.square().sum(-1).mean().sqrt()
        share = ((routed_ND - expected_ND).norm(dim=-1) <= TOLERANCE * scale).double().mean().item()
        if share < NEAR / 2:
            break
    return share


def _precision(block: nn.Module, parts: Parts, trial: Trial) -> str:
    """Precision in which the block computes its logits in a bf16 model."""
    tensors = {name: tensor.bfloat16() for name, tensor in trial.tensors.items()}
    with _evaluated(block, trial.k), torch.no_grad(), _Linear(tensors[parts.router]) as seen, suppress(Exception):
        torch.func.functional_call(block, tensors, (trial.x[:1].bfloat16(),))
    return "model" if seen.dtype == torch.bfloat16 else "float32"


class _Linear(TorchFunctionMode):
    """Watches for the linear map with this weight; `dtype` is the precision in which it was computed."""

    def __init__(self, weight: Tensor):
        self.weight, self.dtype = weight, None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear and args[1].shape == self.weight.shape and torch.equal(args[1].to(self.weight), self.weight):
            self.dtype = args[1].dtype
        return func(*args, **(kwargs or {}))


@contextmanager
def _evaluated(block: nn.Module, k: int) -> Iterator[None]:
    """Evaluation mode, k active experts, a capacity of 1 and the plain computation of experts; all settings are restored on exit."""
    before = []
    for module in block.modules():
        changes = {"training": False}
        for name, value in vars(module).items():
            if name in TOP_K and isinstance(value, int):
                changes[name] = k
            elif "capacity" in name and isinstance(value, int) and not isinstance(value, bool):
                changes[name] = 1
        before.append((module, {name: getattr(module, name) for name in changes}))
        vars(module).update(changes)
    configs = {id(config): config for module in block.modules() if hasattr(config := getattr(module, "config", None), IMPLEMENTATION)}
    implementations = [(config, getattr(config, IMPLEMENTATION)) for config in configs.values()]
    try:
        for config, _ in implementations:
            setattr(config, IMPLEMENTATION, "eager")
        yield
    finally:
        for config, implementation in implementations:
            setattr(config, IMPLEMENTATION, implementation)
        for module, values in before:
            vars(module).update(values)
