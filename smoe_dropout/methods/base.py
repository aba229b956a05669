"""What a method is made of. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from smoe_dropout.options import NoOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from smoe_dropout.config import SMoEConfig
    from smoe_dropout.layer import MoELayer


class Forward(NamedTuple):
    """One pass of the model over a batch: losses per token in nats, the state to carry to the next batch, and logits [..., V]."""

    token_losses: Tensor
    state: Any
    logits: Tensor


class Objective(NamedTuple):
    """`total`: the scalar to minimise, a mean over tokens; `nll`: the mean cross-entropy in it; `state`: to carry on."""

    total: Tensor
    nll: Tensor
    state: Any


class Settings(NamedTuple):
    """Of a training run: the schedule's smallest and largest k, the method's options, and the number of training tokens."""

    k_min: int
    k_max: int
    options: Any
    train_tokens: int


def cross_entropy(model: nn.Module, forward: Callable[[], Forward], settings: Settings) -> Objective:
    """Mean cross-entropy plus the layers' auxiliary losses. `forward` runs the model once; a method may run it more often."""
    passed = forward()
    nll = passed.token_losses.mean()
    return Objective(with_auxiliary(model, nll), nll, passed.state)


def with_auxiliary(model: nn.Module, loss: Tensor) -> Tensor:
    """The loss plus the auxiliary losses of the pass before."""
    from smoe_dropout.control import auxiliary_loss, auxiliary_losses

    return loss + auxiliary_loss(model) if auxiliary_losses(model) else loss


# the training flags that several methods stand for
DENSE = {"moe": False, "dropout": 0.0, "dropatt": 0.0, "dense_drop": False}
LEARNED_ROUTER = {"moe": True, "gate_name": "learned", "freeze_gate": False, "dynamic_moe": False}
FROZEN_ROUTER = {"moe": True, "gate_name": "random", "freeze_gate": True, "dynamic_moe": True}


@dataclass(frozen=True)
class Method:
    """name: as on the command line. title: as in tables. source: paper and section. sparse: whether it has experts.

    flags: the training flags that the method stands for, by field name; what the user gives on the command line wins.
    objective: what is minimised.
    options: what else may be set, a frozen dataclass.
    layer: a MoELayer that routes or combines in its own way.
    convert: of a dense method, what changes the model, given its options; builds on `hosts.find_sites`.
    routers: those the method can use; empty: any that chooses experts.
    refusal: the sentence for a configuration the method cannot take, or None.
    """

    name: str
    title: str
    source: str
    sparse: bool
    flags: Mapping[str, Any] = field(default_factory=dict)
    objective: Callable[[nn.Module, Callable[[], Forward], Settings], Objective] = cross_entropy
    options: type = NoOptions
    layer: type[MoELayer] | None = None
    convert: Callable[[nn.Module, Any], nn.Module] | None = None
    routers: tuple[str, ...] = ()
    refusal: Callable[[SMoEConfig], str | None] = lambda config: None


def refused(method: Method | None, config: SMoEConfig) -> str | None:
    """The sentence for experts so configured that this method, or none, cannot take, or None."""
    allowed = method.routers if method else ()
    if allowed and config.router not in allowed:
        return f"router {config.router!r} cannot be used here: this method takes {' or '.join(map(repr, allowed))}"
    if config.router == "none" and not allowed:
        return "router 'none' is for methods that draw experts themselves: choose one that chooses"
    return method.refusal(config) if method else None
