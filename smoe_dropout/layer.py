"""The MoE feed-forward layer: route -> experts -> combine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.arguments import integer, is_finite, shown
from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts, plain
from smoe_dropout.options import ConfigError, NoOptions, build_options
from smoe_dropout.recomputation import (
    Pass,
    check,
    copied_buffers,
    identical,
    may_be_repeated,
    original,
    recomputing,
    record_pass,
    with_buffers,
    with_record,
)
from smoe_dropout.registry import ROUTERS, load
from smoe_dropout.routers import Routing, route_by_k
from smoe_dropout.selection import CHOSEN, Selection, TokenK, bound, largest, masked, selected
from smoe_dropout.shared import Shared
from smoe_dropout.training import FollowsTraining

STATE_OF_K = "_extra_state"  # torch's name of it in a state_dict, behind the layer's
_LEFT_OUT = ContextVar("left_out", default=False)


@contextmanager
def without_k() -> Iterator[None]:
    """Context manager in which state_dict leaves k out, for folders that have it in their configuration."""
    token = _LEFT_OUT.set(True)
    try:
        yield
    finally:
        _LEFT_OUT.reset(token)


class Use(NamedTuple):
    """Results of one use of a layer: losses by name, chosen experts [N, K], and which tokens are real, bool [N], or None if all are."""

    losses: dict[str, Tensor]
    assigned_NK: Tensor
    real_N: Tensor | None

    @property
    def tokens(self) -> int | Tensor:
        """Number of real tokens."""
        return len(self.assigned_NK) if self.real_N is None else self.real_N.sum()

    @property
    def assigned_to_real(self) -> Tensor:
        """Chosen experts of the real tokens [N', K]."""
        return self.assigned_NK if self.real_N is None else self.assigned_NK[self.real_N]


class MoELayer(nn.Module, FollowsTraining):
    """[..., D] -> [..., D]: y = scale * sum_{i in top-k} g_i E_i(x) (paper section 3.1), in place of a feed-forward network.

    A method that routes or combines differently overrides `route` or `combine`. After a forward pass of the model `losses` holds the
    auxiliary losses and `assigned` the chosen expert indices [N, K] of all the layer's uses in it.

    Class attributes for subclasses:
    Options: options of the layer, a frozen dataclass.
    needs: "attention" for the attention module that precedes the layer, available as `attention`; "probabilities" if that module must keep
        its attention probabilities.
    own_losses: whether the layer has auxiliary losses besides the router's.
    repeatable: whether activation checkpointing may repeat a pass of this layer alone.
    reducible: whether surgery may leave it fewer experts.

    `top_k` is the k in the calling thread or task, and setting it sets the layer's default. A subclass whose `route` also takes a k for
    each token calls `selection(x)` instead; one that uses `top_k` refuses such a k.
    `index` and `count` are the layer's position among the MoE layers of its conversion and their number. conversion: number of the call of
    `moefy` that made it. original: where the weights of the replaced network were, for `unmoefy`. sequence_first: whether inputs are
    [T, B, D]. router_named: whether a warning has named its router as one that the task does not train. watches_cache: whether
    a cache given to `attention` carries what the layer needs of earlier positions.
    """

    Options: type = NoOptions
    needs: frozenset[str] = frozenset()
    own_losses = False
    repeatable = True
    reducible = True
    conversion = 0
    original: dict | None = None
    sequence_first = False
    router_named = False
    watches_cache = False

    def __init__(self, d_model: int, experts: Experts, config: SMoEConfig):
        super().__init__()
        if not isinstance(config, SMoEConfig) or not isinstance(experts, nn.Module):
            given = type(config if isinstance(experts, nn.Module) else experts).__name__
            raise ConfigError(f"a {given} is not what an MoE layer is made of: MoELayer(d_model, experts, SMoEConfig(...))")
        d_model = integer("d_model", d_model)
        self.config = config
        self.options = build_options(self.Options, config.options, known=dict.fromkeys(config.options))
        self.num_experts, self.default_k = config.num_experts, config.top_k
        self.output_scale = float(config.num_experts) if config.output_scale == "dense" else 1.0
        self.router: nn.Module = load(ROUTERS, "router", config.router)(d_model, config)
        self.router.to(experts.bias_up.device, torch.promote_types(experts.bias_up.dtype, torch.float32))
        self.experts = experts
        self.uses: list[Use] = []  # in the last pass, of whichever thread
        self.records: list[list[Pass]] = []  # of the last passes that activation checkpointing may repeat
        self.lost: list[Pass] = []  # of those before them that were not repeated
        self.index, self.count, self.shared = 0, 1, Shared()
        self.router.shared = self.shared
        self._before: list[nn.Module] = []  # a list, so that torch does not register it as a child

    @property
    def top_k(self) -> int:
        """k in this thread or task. ConfigError if it differs between tokens."""
        k = selected(self)
        if isinstance(k, int):
            return k
        raise ConfigError(f"{type(self).__name__} takes one k for all tokens, not a k for each row or token, nor a gate mass")

    @top_k.setter
    def top_k(self, k: int) -> None:
        self.default_k = k

    def selection(self, x: Tensor) -> Selection:
        """k in this thread or task: one for all tokens of x [..., D], one for each of them, or a gate mass."""
        k = selected(self)
        if not isinstance(k, TokenK) or self.shared.repeated is not None:  # whose record has the k of every token
            return k
        if not torch.compiler.is_compiling() and plain.vmapped():
            raise ConfigError("a k for each row or token cannot be used inside torch.vmap, which hides the rows: use one k for all tokens")
        return TokenK(k.of_tokens(x, self.sequence_first, self.shared.batch), k.largest)

    @property
    def variable(self) -> bool:
        """Return whether tokens differ in their number of experts although k is one number."""
        return self.router.variable

    @property
    def attention(self) -> nn.Module | None:
        """The model's attention module before this layer, if the layer or its router needs it."""
        return self._before[0] if self._before else None

    def place(self, index: int, count: int, shared: Shared, attention: nn.Module | None) -> None:
        """Set the layer's position in the model; called by `moefy`."""
        self.index, self.count, self.shared = index, count, shared
        self.router.shared = shared
        self._before = [] if attention is None else [attention]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]. TypeError for integers, such as token ids."""
        if not x.is_floating_point():
            raise TypeError(f"an MoE layer takes hidden states in floating point, but got {x.dtype}: embed token ids first")
        if torch.compiler.is_compiling():
            return self.run(x)
        if recomputing():
            return self.repeat(x)
        copies = copied_buffers(self)
        y = self.run(x)
        if copies and self.records and self.records[-1]:
            own = dict(self.named_buffers())
            changed = {name: copy for name, copy in copies.items() if not identical(copy, own[name])}
            self.records[-1][-1] = self.records[-1][-1]._replace(buffers=changed)
        return y

    def repeat(self, x: Tensor) -> Tensor:
        """Repeat a pass for activation checkpointing with the k, padding, token ids and buffers that it had.

        Raises RuntimeError if it cannot be repeated, or cannot be told from another.
        """
        if not self.repeatable:
            raise RuntimeError(
                f"{type(self).__name__} depends on other layers, so activation checkpointing cannot recompute it alone: "
                "train without gradient checkpointing"
            )
        before, shared = original(self.records, self.lost, x), self.shared
        now = shared.tokens
        shared.tokens, shared.real_N, shared.repeated = before.tokens, before.real_N, before
        try:
            with bound(CHOSEN, {self: before.selection}), with_buffers(self, before.buffers):
                return self.run(x)
        finally:
            shared.tokens, shared.real_N, shared.repeated = now, None, None

    def run(self, x: Tensor) -> Tensor:
        """Route and combine, and keep what was found: x [..., D] -> [..., D]."""
        self.see_padding(x)
        routing = self.route(x)
        if not torch.compiler.is_compiling() and not plain.needed() and not self.uses:
            check_routing(routing, x.numel() // max(x.shape[-1], 1), largest(selected(self)), self.num_experts)
        self.keep(x, routing.losses, routing.indices_NK.detach())
        return self.combine(x.reshape(-1, x.shape[-1]), routing).view_as(x)

    def see_padding(self, x: Tensor) -> None:
        """Tell the router which tokens are real, until `keep`."""
        if self.shared.repeated is None:  # else the mask may be gone
            self.shared.real_N = self.shared.real_tokens(x, masked(self))
            self.shared.see_use(self)

    def keep(self, x: Tensor, losses: dict[str, Tensor], assigned_NK: Tensor) -> None:
        """Store losses and assignments of a use. RuntimeError if a repeated pass has losses that cannot be trained."""
        shared = self.shared
        real_N, shared.real_N = shared.real_N, None
        if torch.compiler.is_exporting():  # tensors of the trace mean nothing afterwards
            return
        if shared.repeated is not None:
            check(shared.repeated, losses)
            return
        before = [] if shared.uses is None else shared.uses.get(self, [])
        self.uses = [*before, Use(losses, assigned_NK, real_N)]
        if shared.uses is not None:
            shared.uses[self] = self.uses
        if torch.compiler.is_compiling() or not may_be_repeated(self.training):
            return
        recorded = record_pass(x, self.selection(x), losses, real_N, shared.tokens)
        self.records, self.lost = with_record(self.records, recorded, bool(before), self.lost)

    @property
    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses of the last pass by name: the mean over the layer's uses, weighted by their tokens."""
        return self.uses[0].losses if len(self.uses) == 1 else mean_losses(self.uses)

    @property
    def assigned(self) -> Tensor | None:
        """Chosen experts of the last pass [N, K], padding included; -1 where a token has fewer than K. None before the first pass."""
        if len(self.uses) < 2:
            return self.uses[0].assigned_NK if self.uses else None
        most = max(use.assigned_NK.shape[1] for use in self.uses)
        return torch.cat([F.pad(use.assigned_NK, (0, most - use.assigned_NK.shape[1]), value=-1) for use in self.uses])

    def route(self, x: Tensor) -> Routing:
        """x [..., D] -> the routing of its N tokens."""
        x_ND, k = x.reshape(-1, x.shape[-1]), self.selection(x)
        return self.router(x_ND, k) if isinstance(k, int) or self.router.ragged else route_by_k(self.router, x_ND, k)

    def combine(self, x_ND: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of the chosen experts' outputs [N, D]."""
        return self.experts(x_ND, routing.indices_NK, self.scaled(routing.weights_NK), ragged=routing.ragged)

    def scaled(self, weights: Tensor) -> Tensor:
        """Gate weights times the output scale."""
        return weights if self.output_scale == 1.0 else weights * self.output_scale

    def load(self) -> Tensor:
        """Fraction of the last pass's assignments that each expert received [E], summing to 1, without padding.

        RuntimeError before the first pass.
        """
        if not self.uses:
            raise RuntimeError("this layer has not run yet, so its experts have no load")
        chosen_M = torch.cat([use.assigned_to_real.flatten() for use in self.uses])
        counts_E = torch.bincount(chosen_M + 1, minlength=self.num_experts + 1)[1:]  # without those of fewer than K experts, -1
        return counts_E / counts_E.sum().clamp(min=1)

    def mean_k(self) -> float:
        """Mean number of experts per real token in the last pass. RuntimeError before the first pass."""
        if not self.uses:
            raise RuntimeError("this layer has not run yet")
        chosen = [use.assigned_to_real for use in self.uses]
        return sum(int((each >= 0).sum()) for each in chosen) / max(sum(len(each) for each in chosen), 1)

    def routing_parameters(self) -> list[nn.Parameter]:
        """Parameters that determine the routing; `freeze_routers` freezes and unfreezes them together."""
        return list(self.router.parameters())

    @property
    def computed_experts(self) -> int:
        """Experts computed per token: k, unless the router or the last pass used more."""
        return self.router.computed(self.top_k)

    def routing_flops(self, lanes: int, positions: int) -> int:
        """FLOPs of routing `lanes` sequences of `positions` tokens each."""
        return self.router.flops(lanes * positions)

    def get_extra_state(self) -> Tensor:
        """k that `set_top_k` has set, a scalar int64 tensor on the CPU that state_dict has beside the weights."""
        return torch.tensor(self.default_k, dtype=torch.int64, device="cpu")

    def set_extra_state(self, state: Tensor | int) -> None:
        """Restore k. ConfigError unless the layer has that many experts."""
        k = state.item() if isinstance(state, Tensor) and state.numel() == 1 and not state.is_meta else state
        if not (is_finite(k) and k == int(k) and 1 <= k <= self.num_experts):
            raise ConfigError(f"k = {shown(k)} must be a whole number from 1 to the {self.num_experts} experts of the layer")
        self.default_k = int(k)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if _LEFT_OUT.get():
            del destination[prefix + STATE_OF_K]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata, strict, missing_keys, unexpected_keys, errors):
        """Load what the state has; that of older versions has no k. A k of another model is reported with the shapes that differ."""
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, errors)
        except ConfigError as error:
            errors.append(f"{prefix}{STATE_OF_K}: {error}")
        if (key := prefix + STATE_OF_K) in missing_keys:
            missing_keys.remove(key)

    def __getstate__(self) -> dict:
        # results of the last pass belong to its autograd graph, which can be neither copied nor pickled
        return {**super().__getstate__(), "uses": [], "records": [], "lost": []}

    def _replicate_for_data_parallel(self) -> MoELayer:
        replica = super()._replicate_for_data_parallel()
        replica.default_k = selected(self)  # replicas run in threads of their own
        if isinstance(replica.default_k, TokenK):
            raise ConfigError("nn.DataParallel splits a batch, but not a k for each row or token: use one k for all tokens, or DDP")
        return replica


def mean_losses(uses: Sequence[Use]) -> dict[str, Tensor]:
    """Mean of each loss over several uses, weighted by their tokens, so that its scale does not depend on their number."""
    names = dict.fromkeys(name for use in uses for name in use.losses)
    total = sum(use.tokens for use in uses)
    total = total.clamp(min=1) if isinstance(total, Tensor) else max(total, 1)
    return {name: sum(use.losses[name] * use.tokens for use in uses if name in use.losses) / total for name in names}


def check_routing(routing: Routing, tokens: int, k: int, num_experts: int) -> None:
    """Validate a router's output on the layer's first pass; routers may be user code. Raises TypeError or ValueError."""
    if not isinstance(routing, Routing):
        raise TypeError(f"the router returned a {type(routing).__name__}, not a Routing(indices_NK, weights_NK, losses)")
    indices_NK, weights_NK, losses, _ = routing
    found = f"the router returned indices {tuple(indices_NK.shape)} of {indices_NK.dtype} and weights {tuple(weights_NK.shape)}"
    if indices_NK.dtype != torch.int64 or indices_NK.shape != weights_NK.shape or indices_NK.dim() != 2 or len(indices_NK) != tokens:
        raise ValueError(f"{found}: both must be [{tokens} tokens, k = {k}], the indices int64")
    if indices_NK.shape[1] < k:
        raise ValueError(f"{found}: at k = {k} every token needs {k} experts")
    if tokens and (indices_NK.min() < -int(routing.ragged) or indices_NK.max() >= num_experts):
        raise ValueError(f"the router chose expert {int(indices_NK.max())}, but experts are numbered 0 to {num_experts - 1}")
    sorted_NK = indices_NK.sort(1).values
    if ((sorted_NK.diff(dim=1) == 0) & (sorted_NK[:, 1:] >= 0)).any():
        raise ValueError("the router chose the same expert twice for one token: its k experts must be distinct")
    if wrong := [name for name, loss in losses.items() if not isinstance(loss, Tensor) or loss.dim()]:
        raise ValueError(f"the router's loss {wrong[0]!r} must be a scalar tensor")
