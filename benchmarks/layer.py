"""The expert layer, router included, forward and backward: our backends and peers, as time over the dense network of equal parameters."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Common, Precision, autocast, interleave, kept_mib, record, summarise
from benchmarks.peers import EXPERT_PEERS, dense_ffn, with_peer
from smoe_dropout import MoELayer, SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.registry import BACKENDS, load

OURS = ("sorted", "masked", "grouped", "auto")
DENSE = "dense"


@dataclass(frozen=True)
class LayerFlags(Common):
    """Time of one expert layer over the dense network of equal parameters."""

    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """fp32, bf16 or both"""
    k: tuple[int, ...] = (2, 8, 12, 16)
    """numbers of active experts"""
    tokens: int = 2048
    """tokens per pass"""
    num_experts: int = 16
    """experts"""
    d_model: int = 256
    """width of the model"""
    d_expert: int = 512
    """hidden width of an expert"""
    dropout: float = 0.0
    """dropout rate of the hidden layer"""


def contestants(flags: LayerFlags, k: int, precision: Precision) -> dict[str, nn.Module]:
    """Layers by name, with equal weights each of its own; the dense network is the baseline."""
    torch.manual_seed(0)
    experts = Experts(flags.num_experts, flags.d_model, flags.d_expert, "relu", flags.dropout, "auto", 0.02)
    layer = MoELayer(flags.d_model, experts, SMoEConfig(num_experts=flags.num_experts, top_k=k, d_expert=flags.d_expert))
    weights = experts.weights(torch.bfloat16 if precision == "bf16" else torch.float32)
    found: dict[str, nn.Module] = {DENSE: dense_ffn(experts)}
    for backend in OURS:
        if backend == "auto" or load(BACKENDS, "backend", backend).refusal(weights, "cpu") is None:
            found[f"ours: {backend}"] = copy.deepcopy(layer)
            found[f"ours: {backend}"].experts.backend = backend
    return found | {name: with_peer(layer, name) for name in EXPERT_PEERS}


def forward_backward(module: nn.Module, x_ND: Tensor, grad_ND: Tensor, precision: Precision) -> tuple[Tensor, ...]:
    """Output, and gradients of the input and of the trained parameters."""
    y_ND = forward(module, x_ND, precision)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return y_ND, *torch.autograd.grad(y_ND, [x_ND, *trained], grad_ND.to(y_ND.dtype))


def forward(module: nn.Module, x_ND: Tensor, precision: Precision) -> Tensor:
    with autocast(precision):
        return module(x_ND)


def measure_row(flags: LayerFlags, precision: Precision, k: int) -> dict[str, Any]:
    """All contestants at one k in one precision."""
    modules = contestants(flags, k, precision)
    # new tokens in every round, the same for all contestants: experts then get other numbers of tokens, as in training
    xs = [torch.randn(flags.tokens, flags.d_model, requires_grad=True) for _ in range(flags.rounds + 1)]
    x_ND, grad_ND = xs[0], torch.randn(flags.tokens, flags.d_model)

    def call(module: nn.Module) -> Callable[[], Any]:
        rounds = iter(xs)
        return lambda: forward_backward(module, next(rounds), grad_ND, precision)

    results = summarise(interleave({name: call(module) for name, module in modules.items()}, flags.rounds), DENSE)
    for name, module in modules.items():
        results[name]["kept_mib"] = kept_mib(lambda module=module: forward(module, x_ND, precision), [x_ND, *module.parameters()])
    return {"precision": precision, "k": k, "results": results}


def run(flags: LayerFlags) -> dict[str, Any]:
    """Measures and writes the record."""
    rows = [measure_row(flags, precision, k) for precision in flags.precision for k in flags.k]
    return record("layer", flags, DENSE, rows)
