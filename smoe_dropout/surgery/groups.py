"""What a method of surgery decides and makes: which experts become one, and the tensors of that one.

A method is a module with
    NEEDS: bool                                                    a calibration
    OPTIONS: dict[str, Any]                                        that may be given, with their defaults
    groups(layers, calibrations, keep, options) -> list[list[Group]]     for every layer, in order, the new experts
    combine(layer, group, calibration) -> Expert                   the tensors of one of them
"""

from typing import NamedTuple

from torch import Tensor


class Group(NamedTuple):
    """The old experts that become one new expert, which is chosen by the router row of their leader."""

    members: tuple[int, ...]
    leader: int


class Expert(NamedTuple):
    """One expert; of a gated one up [2H, D] and its bias hold the gate's rows first."""

    up_HD: Tensor
    bias_up_H: Tensor
    down_HD: Tensor
    bias_down_D: Tensor


def expert_of(experts, index: int) -> Expert:
    """A view of the expert with that index."""
    return Expert(*(stacked[index] for stacked in experts.weights(experts.up.dtype)[:4]))
