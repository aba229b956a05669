"""Statistics of one MoE layer, added up while passes run, and the removal of its tokens' first experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from smoe_dropout.layer import MoELayer
from smoe_dropout.microscope import measures
from smoe_dropout.options import ConfigError
from smoe_dropout.precision import without_autocast
from smoe_dropout.routers import Router, Routing

Route = Callable[[Tensor], Routing]
FEWEST = 4  # tokens of a batch whose outputs are compared


@contextmanager
def routing_by(layers: Sequence[MoELayer], change: Callable[[MoELayer, Route, Tensor], Routing]) -> Iterator[None]:
    """Context manager in which `change(layer, route, x)` replaces `layer.route(x)`, which it is given as `route`."""
    for layer in layers:
        layer.route = partial(change, layer, layer.route)
    try:
        yield
    finally:
        for layer in layers:
            del layer.route  # the method of its class again


def without_first(layer: MoELayer, route: Route, x: Tensor) -> Routing:
    """Routing without each token's first expert, after the shared ones (DeepSeekMoE, arXiv 2401.06066, section 4.5).

    With k + 1 selected, the k best of the remaining experts are left. Weights that have the same sum for all tokens have it again.
    """
    routing = route(x)
    indices_NK, weights_NK = routing.indices_NK, routing.weights_NK
    first_NK = torch.zeros_like(indices_NK, dtype=torch.bool)
    first_NK.scatter_(1, (indices_NK >= layer.config.shared_experts).int().argmax(1, keepdim=True), True)
    first_NK &= indices_NK >= layer.config.shared_experts
    left_NK, router, total_N = weights_NK.masked_fill(first_NK, 0), layer.router, weights_NK.sum(1)
    some_N = total_N[total_N > 0]
    indices_NK = indices_NK.masked_fill(first_NK, -1)
    if router.equal and not router.uniform:  # a factor that depends on k
        left_NK = (indices_NK >= 0) * router.factor[((indices_NK >= 0).sum(1, keepdim=True) - 1).clamp(min=0)]
    elif len(some_N) and bool(some_N.amax() - some_N.amin() <= 1e-4 * some_N.amax()):
        left_NK = left_NK * (total_N / left_NK.sum(1).clamp(min=measures.TINY))[:, None]
    changed = routing._replace(indices_NK=indices_NK, weights_NK=left_NK.to(weights_NK.dtype), ragged=True)
    for name, value in getattr(routing, "__dict__", {}).items():  # of a method's own kind of routing
        setattr(changed, name, value)
    return changed


def probabilities(router: Router, logits_NE: Tensor) -> Tensor:
    """The router's probability of each expert [N, E]."""
    sigmoid = getattr(router.options, "score", None) == "sigmoid"
    return (F.logsigmoid(logits_NE) if sigmoid else router.shares(logits_NE)).float().softmax(-1)


class Watch:
    """Sums over the tokens of one layer. real: which positions of the running pass count; None: all, but for known padding.

    Routed experts are numbered from the first that is not shared; shared ones, which every token has, tell nothing of the routing.
    """

    def __init__(self, layer: MoELayer, seed: int, sample: int):
        self.layer, self.shared, self.sample = layer, layer.config.shared_experts, sample
        self.draw = torch.Generator().manual_seed(seed)
        self.real: Tensor | None = None
        E, routed = layer.num_experts, layer.num_experts - self.shared
        self.tokens = self.sampled = 0
        self.sure = self.margin = 0.0
        self.scored = self.bounded = 0  # tokens with logits, and those with experts on both sides of the margin
        self.counts_EE = torch.zeros(routed, routed, dtype=torch.float64)
        self.cosines_EE, self.gram_EE, self.dependence_EE = torch.zeros(3, E, E, dtype=torch.float64)
        self.routes: list[Tensor] = []

    def see(self, route: Route, x: Tensor) -> Routing:
        """Route, and count what was chosen."""
        layer, shown = self.layer, self.layer.shared.shown
        asked = layer.router in shown
        logits = shown.setdefault(layer.router, [])
        begin = len(logits)
        routing, x_ND = route(x), x.reshape(-1, x.shape[-1])
        own = logits[begin:]
        if not asked:
            del shown[layer.router]
        real_N = layer.shared.real_N if self.real is None else self.real.flatten().to(x.device)
        if real_N is not None and len(real_N) != len(x_ND):
            raise ConfigError(f"the mask has {len(real_N)} positions, but an MoE layer read {len(x_ND)}")
        chosen_NK = routing.indices_NK - self.shared
        if real_N is not None:
            x_ND, chosen_NK, own = x_ND[real_N], chosen_NK[real_N], [logits_NE[real_N] for logits_NE in own]
        chosen_NK = chosen_NK.clamp(min=-1)
        has_NE = torch.zeros(len(chosen_NK), len(self.counts_EE) + 1, device=x.device).scatter_(1, chosen_NK + 1, 1)[:, 1:]
        self.counts_EE += (has_NE.t() @ has_NE).double().cpu()
        self.tokens += len(chosen_NK)
        self.routes.append(chosen_NK.to("cpu", torch.int16))
        if len(own) == 1:
            self.score(probabilities(layer.router, own[0])[:, self.shared :], has_NE.bool())
        with without_autocast(x.device.type):
            self.compare(x_ND)
        return routing

    def score(self, share_NE: Tensor, has_NE: Tensor) -> None:
        """Add the probability of the best expert, and the least of a chosen one less the most of one that is not."""
        self.sure += share_NE.amax(1).double().sum().item()
        self.scored += len(share_NE)
        margin_N = share_NE.masked_fill(~has_NE, torch.inf).amin(1) - share_NE.masked_fill(has_NE, -torch.inf).amax(1)
        margin_N = margin_N[margin_N.isfinite()].double()
        self.margin += margin_N.sum().item()
        self.bounded += len(margin_N)

    def compare(self, x_ND: Tensor) -> None:
        """Compare the outputs of all experts for a sample of the tokens, drawn from each pass."""
        if min(len(x_ND), self.sample) < FEWEST:
            return
        places_S = torch.randperm(len(x_ND), generator=self.draw)[: self.sample].to(x_ND.device)
        x_SD = x_ND[places_S].to(torch.promote_types(x_ND.dtype, torch.float32))
        outputs_SED = self.layer.experts.each(x_SD)
        flat_EM = outputs_SED.transpose(0, 1).flatten(1)
        self.sampled += len(places_S)
        self.cosines_EE += measures.cosines(outputs_SED).cpu()
        self.gram_EE += (flat_EM @ flat_EM.t()).double().cpu()
        self.dependence_EE += measures.dependence(outputs_SED).cpu()
