"""Interface of surgery methods. A method is a module with

NEEDS: bool                                                         whether it requires a calibration
OPTIONS: dict[str, Any]                                             its options and their defaults
groups(layers, calibrations, keep, options) -> list[list[Group]]    the new experts of every layer, in order
combine(layer, group, calibration) -> Expert                        the tensors of one new expert

`groups` sees neither the shared experts nor their calibration: they stay as they are, and `keep` does not count them.
"""

from typing import NamedTuple

from torch import Tensor


class Group(NamedTuple):
    """Indices of the old experts that form one new expert, of the leader whose router row it gets, and of the expert to which the members
    are aligned; None: the leader.
    """

    members: tuple[int, ...]
    leader: int
    reference: int | None = None


def with_shared(groups: list[Group], shared: int) -> list[Group]:
    """Groups of the experts behind the first `shared`, and these, each unchanged."""
    moved = [
        Group(
            tuple(index + shared for index in group.members),
            group.leader + shared,
            None if group.reference is None else group.reference + shared,
        )
        for group in groups
    ]
    return [*(Group((index,), index) for index in range(shared)), *moved]


class Expert(NamedTuple):
    """Tensors of one expert. For a gated activation `up` is [2H, D], the gate's rows first, and likewise its bias."""

    up_HD: Tensor
    bias_up_H: Tensor
    down_HD: Tensor
    bias_down_D: Tensor


def expert_of(experts, index: int) -> Expert:
    """View of the expert with this index."""
    return Expert(*(stacked[index] for stacked in experts.weights(experts.up.dtype)[:4]))
