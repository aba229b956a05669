"""What a method is made of. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn


class Forward(NamedTuple):
    """One pass of the model over a batch: losses per token in nats, and the state to carry to the next batch."""

    token_losses: Tensor
    state: Any


class Objective(NamedTuple):
    """`total`: the scalar to minimise, a mean over tokens; `nll`: the mean cross-entropy in it; `state`: to carry on."""

    total: Tensor
    nll: Tensor
    state: Any


def likelihood(model: nn.Module, forward: Callable[[], Forward]) -> Objective:
    """Mean cross-entropy plus the routers' auxiliary losses. `forward` runs the model once; a method may run it more often."""
    from smoe_dropout.control import auxiliary_loss

    losses, state = forward()
    nll = losses.mean()
    auxiliary = auxiliary_loss(model)
    return Objective(nll if auxiliary is None else nll + auxiliary, nll, state)


@dataclass(frozen=True)
class Method:
    """name: as on the command line. title: as in tables. source: paper and section. sparse: whether it has experts.

    flags: the training flags that the method stands for, by field name; what the user gives on the command line wins.
    objective: what is minimised.
    """

    name: str
    title: str
    source: str
    sparse: bool
    flags: Mapping[str, Any] = field(default_factory=dict)
    objective: Callable[[nn.Module, Callable[[], Forward]], Objective] = likelihood
