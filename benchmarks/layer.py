"""The expert layer, router included, forward and backward: our backends and peers, as time over the dense network of equal parameters."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Common, Device, Precision, autocast, compare
from benchmarks.peers import EXPERT_PEERS, dense_ffn, with_peer
from smoe_dropout import MoELayer, SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.registry import BACKENDS, load

AUTO = "ours: auto"
DROPPING, RATE = "ours: auto, dropout 0.1", 0.1  # what dropout of hidden values costs
NOT_OURS_TO_TRAIN = ("reference", "few", "fastmoe")  # the definition; for inference; a peer
OURS = {f"ours: {name}": name for name in BACKENDS if name not in NOT_OURS_TO_TRAIN} | {AUTO: "auto"}
BASELINE = "dense"


@dataclass(frozen=True)
class LayerFlags(Common):
    """Time of one expert layer over the dense network of equal parameters."""

    precision: tuple[Precision, ...] = ("fp32", "bf16")
    """fp32, bf16 or both"""
    k: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
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


def moe_layer(flags: LayerFlags, k: int) -> MoELayer:
    torch.manual_seed(0)
    experts = Experts(flags.num_experts, flags.d_model, flags.d_expert, "relu", flags.dropout, "auto", 0.02)
    return MoELayer(flags.d_model, experts, SMoEConfig(num_experts=flags.num_experts, top_k=k, d_expert=flags.d_expert))


def able(layer: MoELayer, precision: Precision, device: Device) -> list[str]:
    """Names of the contestants that can run on the device; the dense network is the baseline."""
    weights = layer.experts.weights(torch.bfloat16 if precision == "bf16" else torch.float32)
    refusals = {name: load(BACKENDS, "backend", backend).refusal for name, backend in OURS.items() if backend != "auto"}
    refusals |= {name: peer.refusal for name, peer in EXPERT_PEERS.items()}
    refused = {name for name, refusal in refusals.items() if refusal(weights, device) is not None}
    ours = OURS if layer.experts.dropout else [*OURS, DROPPING]
    return [name for name in (BASELINE, *ours, *EXPERT_PEERS) if name not in refused]


def contestant(layer: MoELayer, name: str) -> nn.Module:
    """An implementation of the layer, with its own copy of the weights."""
    if name == BASELINE:
        return dense_ffn(layer.experts)
    if name in EXPERT_PEERS:
        return with_peer(layer, name)
    layer = copy.deepcopy(layer)
    layer.experts.backend = OURS.get(name, "auto")
    layer.experts.dropout = RATE if name == DROPPING else layer.experts.dropout
    return layer


def forward_backward(module: nn.Module, x_ND: Tensor, grad_ND: Tensor, precision: Precision) -> tuple[Tensor, ...]:
    """Output, and gradients of the input and of the trained parameters."""
    with autocast(precision, x_ND.device.type):
        y_ND = module(x_ND)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return y_ND, *torch.autograd.grad(y_ND, [x_ND, *trained], grad_ND.to(y_ND.dtype))


def measure_row(flags: LayerFlags, precision: Precision, k: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures the named contestants (default: all that can run) at one k in one precision. bound: operations over the dense ones."""
    layer = moe_layer(flags, k)
    size = flags.tokens, flags.d_model
    grad_ND = torch.randn(size, device=flags.device)

    def call(module: nn.Module) -> Callable[[], Any]:
        # new tokens in every round and for every contestant: experts then get other numbers of tokens, as in training, and no contestant
        # finds the kernels of its sizes built by another
        rounds = iter([torch.randn(size, device=flags.device, requires_grad=True) for _ in range(flags.rounds + 2)])
        return lambda: forward_backward(module, next(rounds), grad_ND, precision)

    calls = {name: call(contestant(layer, name).to(flags.device)) for name in names or able(layer, precision, flags.device)}
    return {"precision": precision, "k": k, "bound": k / flags.num_experts, "results": compare(calls, flags, BASELINE)}


def rows(flags: LayerFlags) -> list[dict[str, Any]]:
    """A row for each precision and k."""
    return [measure_row(flags, precision, k) for precision in flags.precision for k in flags.k]
