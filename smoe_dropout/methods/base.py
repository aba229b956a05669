"""Definition of a training method. Importing this module does not import torch."""

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
    """Result of one pass over a batch: losses per token in nats, the state to carry to the next batch, and logits [..., V].

    Logits may be normalised, that is log-probabilities; a model may leave them out, None, unless the method `reads_logits`.
    """

    token_losses: Tensor
    state: Any
    logits: Tensor | None


class Objective(NamedTuple):
    """total: scalar to minimise, a mean over tokens. nll: mean cross-entropy. state: state to carry to the next batch."""

    total: Tensor
    nll: Tensor
    state: Any


class Settings(NamedTuple):
    """Settings of a training run: the schedule's smallest and largest k, the method's options, and the number of training tokens."""

    k_min: int
    k_max: int
    options: Any
    train_tokens: int


def cross_entropy(model: nn.Module, forward: Callable[[], Forward], settings: Settings) -> Objective:
    """Mean cross-entropy plus the layers' auxiliary losses. `forward` runs the model once; other objectives may call it repeatedly."""
    passed = forward()
    nll = passed.token_losses.mean()
    return Objective(with_auxiliary(model, nll), nll, passed.state)


def with_auxiliary(model: nn.Module, loss: Tensor) -> Tensor:
    """The loss plus the auxiliary losses of the last pass."""
    from smoe_dropout.control import auxiliary_loss, auxiliary_losses

    return loss + auxiliary_loss(model) if auxiliary_losses(model) else loss


# training flags shared by several methods
DENSE = {"moe": False, "dropout": 0.0, "dropatt": 0.0, "dense_drop": False}
LEARNED_ROUTER = {"moe": True, "gate_name": "learned", "freeze_gate": False, "dynamic_moe": False}
FROZEN_ROUTER = {"moe": True, "gate_name": "random", "freeze_gate": True, "dynamic_moe": True}


@dataclass(frozen=True)
class Method:
    """A training method.

    name: name on the command line. title: name in tables. source: paper and section. sparse: whether it has experts.
    flags: training flags that the method sets, by field name; the user's flags take precedence.
    objective: function to minimise.
    options: further settings, a frozen dataclass.
    layer: a MoELayer subclass that routes or combines differently.
    convert: for dense methods, a function that modifies the model, given the options; uses `hosts.find_sites`.
    routers: routers that the method supports; empty: any that chooses experts.
    refusal: returns an error sentence for a configuration that the method does not support, or None.
    baseline: whether every comparison shows it, as published.
    reads_logits: whether the objective uses `Forward.logits`.
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
    baseline: bool = False
    reads_logits: bool = False


def refused(method: Method | None, config: SMoEConfig) -> str | None:
    """Error sentence if the method, or the plain layer without a method, does not support this configuration; else None."""
    allowed = method.routers if method else ()
    if allowed and config.router not in allowed:
        return f"router {config.router!r} cannot be used here: this method supports {' or '.join(map(repr, allowed))}"
    if config.router == "none" and not allowed:
        return "router 'none' is for methods that draw experts themselves: use another router"
    return method.refusal(config) if method else None
