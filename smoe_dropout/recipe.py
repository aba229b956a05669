"""Cuts the FFNs of a trained model into experts by what they do, and fits routers to the cut, without training anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import SEEDS, integer, require_weights
from smoe_dropout.config import ExpertInit, SMoEConfig
from smoe_dropout.control import moe_layers, top_k
from smoe_dropout.conversion import install, planned
from smoe_dropout.cuts import Neurons, Sample, arranged
from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError, option_names, require
from smoe_dropout.planning.trial import mean_loss
from smoe_dropout.registry import ROUTERS, load, unknown
from smoe_dropout.restoration import unmoefy
from smoe_dropout.routers import LinearRouter, RandomRouter, Router
from smoe_dropout.surgery.calibration import checked_pass

Correction = Literal["none", "norm", "mean"]
Gate = Literal["unit", "softmax"]
Pass = tuple[Callable[[], object], Tensor | None]

CHUNK = 1024  # tokens whose hidden units, or outputs of all experts, are in memory at once
FITTED = 2048  # tokens on which corrections are fitted
LEFT_OUT = 1 / 4  # share of the experts that tokens leave out where the mean correction is fitted
MOST = 16  # numbers of experts at which the loss is measured
STAGES = ("calibration", "cut and routers", "losses")


@dataclass(frozen=True)
class Recipe:
    """Account of what `convert` did; `str` gives it in a few lines.

    model: its class. config: of the MoE layers. networks: number of FFNs. width: their hidden units. correction: of what is left out.
    tokens: calibration tokens that were used. dense_loss: mean loss of the held-out passes before the conversion. losses: after it, by k.
    seconds: by stage, "calibration", "cut and routers" and "losses".
    """

    model: str
    config: SMoEConfig
    networks: int
    width: int
    correction: str
    tokens: int
    dense_loss: float
    losses: dict[int, float]
    seconds: dict[str, float]

    def __str__(self) -> str:
        E, S = self.config.num_experts, self.config.shared_experts
        shared = f", {S} of them shared" if S else ""
        made, cut = ("copied to", "copies") if self.config.expert_init == "copy" else ("cut into", f"cut {self.config.cut}")
        correction = "" if self.correction == "none" else f", {self.correction} correction"
        lines = [
            f"{self.model}: {self.networks} feed-forward networks of {self.width} hidden units {made} {E} experts{shared}",
            f"  {cut}, router {self.config.router}, gate weight {self.config.gate_weight}{correction}, {self.tokens:,} calibration tokens",
            f"  {'k':>6}  {'loss':>8}  {'change':>8}",
            f"   dense  {self.dense_loss:8.4f}",
            *(f"  {k:>6}  {loss:8.4f}  {loss - self.dense_loss:+8.4f}" for k, loss in sorted(self.losses.items(), reverse=True)),
            f"  {', '.join(f'{stage} {seconds:.0f} s' for stage, seconds in self.seconds.items())}",
        ]
        return "\n".join(lines)


def convert(
    model: nn.Module,
    passes: Iterable[Pass],
    num_experts: int = 16,
    held_out: Iterable[Pass] | None = None,
    cut: str | None = None,
    router: str = "learned",
    shared_experts: int = 0,
    correction: Correction | None = None,
    tokens: int = 8192,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
    expert_init: ExpertInit = "split",
    gate_weight: Gate | None = None,
    **changes: Any,
) -> Recipe:
    """Cut a trained model's FFNs into experts, in place, fit routers to them, and measure the loss at each k. Nothing is trained.

    With all experts active the model computes what it did. Fewer, by `set_top_k`, `top_k` or `slim`, cost less and lose a little; all the
    rest of the library applies. Build the optimiser afterwards, since the model's parameters change.

    passes: pairs of a function that runs the model once on calibration data and returns its mean loss, and a bool mask of the positions to
    count, in the order in which the FFNs see them; None counts all. What the FFNs read in the first `tokens` positions decides the cut.
    num_experts: E, a divisor of the FFN width.
    held_out: passes that measure the loss; None: the last eighth of `passes`, at least one.
    cut: a name in `registry.CUTS`. "coactivation", the default, makes what a token leaves out weakest.
    router: a name in `registry.ROUTERS` whose weights `gate_weight` decides. "learned": linear, fitted by ridge regression to the strength
        of the experts; "representative" (CMoE); "mlp" (MoEfication); "random" and others are not fitted.
    shared_experts: S, the number of experts of the most important neurons, which every token chooses.
    correction: of the sum of chosen experts. "norm", the default: a factor for each k, by least squares; "mean": the mean output of the
        experts that are left out, at 3/4 of the experts, is added; it needs a shared expert.
    seed: of what is drawn; torch's default generator is left as it was.
    say: called with a line after each part of the work, for progress.
    expert_init: "copy": E copies of each whole network (sparse upcycling, arXiv 2212.05055), to be trained; until then they compute what it
        does at any k. Nothing is cut or fitted.
    gate_weight: "unit", the sum that is exact, or "softmax", the default for copies, with which later training trains the router, too. Of
        experts that are cut the weighted mean is taken times E, and is exact only where all weights are equal.
    changes: further fields of `SMoEConfig`, such as `layers`.

    The model runs in evaluation mode without gradients; modes are restored. Raises ConfigError, leaving the model as it was, as `moefy` and
    `calibrate` do, for fewer than two passes without `held_out`, and for a held-out pass that returns no loss.
    """
    require_weights(model)
    require(not moe_layers(model), f"{type(model).__name__} has MoE layers already: convert takes a dense model")
    calibrating, measuring = _divided(passes, held_out)
    copies = expert_init == "copy"
    gate_weight = gate_weight or ("softmax" if copies else "unit")
    correction = correction or ("norm" if gate_weight == "unit" else "none")
    for name, value, choices in (("correction", correction, Correction), ("gate_weight", gate_weight, Gate)):
        require(value in get_args(choices), unknown(name, str(value), list(get_args(choices))))
    require(
        expert_init in ("split", "copy"),
        f"expert_init = {expert_init!r} is not for convert, which keeps what is trained: use 'split' or 'copy'",
    )
    require(
        correction == "none" or gate_weight == "unit",
        f"correction = {correction!r} is of a sum of experts, which gate_weight = {gate_weight!r} does not form: leave it out",
    )
    require(
        correction != "mean" or shared_experts != 0, "correction = 'mean' is added by a shared expert: set shared_experts to at least 1"
    )
    tokens, seed = integer("tokens", tokens), integer("seed", seed, *SEEDS)
    chosen = {"num_experts": num_experts, "router": router, "shared_experts": shared_experts}
    chosen |= {"expert_init": expert_init, "gate_weight": gate_weight, "cut": cut or ("contiguous" if copies else "coactivation")}
    config = _configured(model, chosen, changes)
    modes, training, laps = [(module, module.training) for module in model.modules()], model.training, [time.perf_counter()]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            model.eval()
            dense_loss = _mean_loss(measuring, num_experts)
            install(model, config, cuts=False)
            layers = moe_layers(model)
            inputs = _inputs(layers, calibrating, tokens)
            say(f"read {len(inputs[0]):,} tokens to fit to")
            laps.append(time.perf_counter())
            draw = torch.Generator().manual_seed(seed)
            for place, ((name, layer), inputs_TD) in enumerate(zip(layers, inputs, strict=True)):
                if not copies:
                    _fit(layer, inputs_TD.to(layer.experts.down.device, torch.float32), draw, correction)
                say(f"{name}: {place + 1} of {len(layers)}")
            laps.append(time.perf_counter())
            losses = {}
            for k in sorted({round(num_experts * part / MOST) or 1 for part in range(1, MOST + 1)}, reverse=True):
                with top_k(model, k):
                    losses[k] = _mean_loss(measuring, k)
                say(f"loss at k = {k}: {losses[k]:.4f}")
            laps.append(time.perf_counter())
    except BaseException:
        _take_back(model, modes)
        raise
    for _, layer in layers:
        layer.train(training)
    _restore(modes)
    seconds = {stage: end - begin for stage, begin, end in zip(STAGES, laps, laps[1:], strict=False)}
    width = layers[0][1].experts.down.shape[copies:2].numel()
    return Recipe(type(model).__name__, config, len(layers), width, correction, len(inputs[0]), dense_loss, losses, seconds)


def _divided(passes: Iterable[Pass], held_out: Iterable[Pass] | None) -> tuple[list[Pass], list[Pass]]:
    """Passes for the calibration, and those that measure the loss. ConfigError for anything else, and for too few."""
    both = [passes] if held_out is None else [passes, held_out]
    for name, some in zip(("passes", "held_out"), both, strict=False):
        fits = isinstance(some, Iterable) and not isinstance(some, Tensor)
        require(fits, f"{name} is a {type(some).__name__}, not pairs of a function and a mask")
    both = [[checked_pass(one) for one in some] for some in both]
    if held_out is None:
        count = len(both[0])
        require(count >= 2, f"passes has {count} pass: give at least 2, of which the last is held out, or held_out")
        kept = count - max(1, count // 8)
        both = [both[0][:kept], both[0][kept:]]
    require(all(both), "there are no passes: give at least one for the calibration, and one that is held out")
    return both[0], both[1]


def _configured(model: nn.Module, chosen: dict[str, Any], changes: dict[str, Any]) -> SMoEConfig:
    """Configuration of the layers: all experts active, the router of a sum frozen. ConfigError for a change of what is decided here."""
    copies, summed = chosen["expert_init"] == "copy", chosen["gate_weight"] == "unit"
    fixed = {"top_k": chosen["num_experts"], "output_scale": "mean" if copies or summed else "dense"}
    if wrong := sorted(changes.keys() & fixed.keys()):
        raise ConfigError(
            f"{wrong[0]} = {changes[wrong[0]]!r} is not for convert, which sets {wrong[0]} = {fixed[wrong[0]]!r}: leave it out"
        )
    frozen = {"freeze_router": True, "balance_loss": 0.0} if summed else {}
    config = SMoEConfig.from_dict({**frozen, **changes, **chosen, **fixed})
    if copies:
        unfitted = load(ROUTERS, "router", config.router).fit in (Router.fit, LinearRouter.fit, RandomRouter.fit)
        require(unfitted, f"router = {config.router!r} is fitted to a cut, and copies have none: use 'learned'")
        require(config.cut == "contiguous", f"cut = {config.cut!r} has no effect with expert_init = 'copy': leave it out")
    if "activation" not in option_names([load(ROUTERS, "router", config.router).Options]) or "activation" in config.options:
        return config
    activations = sorted({site.activation for site in planned(model, config, cuts=False).sites})
    require(len(activations) == 1, f"router {config.router!r} takes one activation, but the networks have {', '.join(activations)}")
    return replace(config, options={**config.options, "activation": activations[0]})


def _mean_loss(passes: Sequence[Pass], k: int) -> float:
    """Mean loss of the passes, weighted by their positions where masks tell them. ConfigError for a pass that returns none."""
    weights = [1 if mask is None else int(mask.sum()) for _, mask in passes]
    return sum(weight * mean_loss(run(), (k,)) for (run, _), weight in zip(passes, weights, strict=True)) / max(sum(weights), 1)


def _inputs(layers: Sequence[tuple[str, MoELayer]], passes: Iterable[Pass], tokens: int) -> list[Tensor]:
    """Inputs of each layer at the first `tokens` positions that count [T, D], on the CPU. ConfigError for a layer that reads nothing."""
    real: Tensor | None = None
    seen: list[list[Tensor]] = [[] for _ in layers]

    def hook(place: int) -> Callable:
        def see(_experts: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x_ND = arguments[0]
            if real is not None and real.numel() != len(x_ND):
                raise ConfigError(f"the mask has {real.numel()} positions, but {layers[place][0]!r} read {len(x_ND)}")
            seen[place].append((x_ND if real is None else x_ND[real.flatten().to(x_ND.device)]).cpu())

        return see

    hooks = [layer.experts.register_forward_pre_hook(hook(place)) for place, (_, layer) in enumerate(layers)]
    try:
        for run, mask in passes:
            real = mask
            run()
            if min(sum(map(len, its)) for its in seen) >= tokens:
                break
    finally:
        for each in hooks:
            each.remove()
    unseen = [name for (name, _), its in zip(layers, seen, strict=True) if not sum(map(len, its))]
    require(not unseen, f"no position of the calibration data reached {', '.join(unseen)}: the passes must run every network")
    found = [torch.cat(its)[:tokens] for its in seen]
    require(all(bool(x_TD.isfinite().all()) for x_TD in found), "the model computes values that are not finite on the calibration data")
    return found


def _fit(layer: MoELayer, inputs_TD: Tensor, draw: torch.Generator, correction: Correction) -> None:
    """Deal the layer's neurons anew, fit its router, and correct what is left out."""
    experts, config = layer.experts, layer.config
    E, H, _ = experts.down.shape
    rows_WFD, bias_WF = (flat(stacked.float(), H) for stacked in (experts.up, experts.bias_up))
    norm_F, apply = experts.down.float().flatten(0, 1).norm(dim=1), ACTIVATIONS[experts.activation].apply
    hidden = (apply(torch.addmm(bias_WF.flatten(), x_TD, rows_WFD.flatten(0, 1).t())) for x_TD in inputs_TD.split(CHUNK))
    strength_TF = torch.cat([hidden_TF.abs_() * norm_F for hidden_TF in hidden])
    neurons = Neurons(rows_WFD[0], strength_TF.mean(0), Sample(inputs_TD, strength_TF))
    order_F = arranged(config.cut, neurons, E, config.shared_experts, draw)
    for stacked in (experts.up, experts.bias_up, experts.down):
        stacked.copy_(flat(stacked, H)[:, order_F].unflatten(1, (E, H)).transpose(0, 1).flatten(1, 2))
    layer.router.fit(inputs_TD, strength_TF[:, order_F].unflatten(1, (E, H)).sum(-1), experts)
    if correction != "none":
        _correct(layer, inputs_TD[:FITTED], correction)


def flat(stacked: Tensor, H: int) -> Tensor:
    """Rows of the first map or biases of all experts [E, W H, ...] -> [W, F, ...] as in the dense network, where the gate's come first."""
    return stacked.unflatten(1, (-1, H)).transpose(0, 1).flatten(1, 2)


def _correct(layer: MoELayer, inputs_TD: Tensor, correction: Correction) -> None:
    """Fit a factor for each k, or move the mean outputs of experts that are left out to the first shared expert."""
    experts, E = layer.experts, layer.num_experts
    left = max(1, round(E * LEFT_OUT))
    products_E, squares_E = inputs_TD.new_zeros(2, E)
    sums_ED, times_E = inputs_TD.new_zeros(E, inputs_TD.shape[1]), inputs_TD.new_zeros(E)
    for x_TD in inputs_TD.split(CHUNK):
        indices_TE = layer.router(x_TD, E).indices_NK
        each_TED = experts.each(x_TD.to(experts.down.dtype)).float()
        growing_TED = each_TED.gather(1, indices_TE[..., None].expand_as(each_TED)).cumsum(1)
        products_E += torch.einsum("ted,td->e", growing_TED, growing_TED[:, -1])
        squares_E += growing_TED.square().sum((0, 2))
        out_TE = torch.zeros_like(indices_TE, dtype=torch.float32).scatter_(1, indices_TE[:, -left:], 1.0)
        sums_ED += torch.einsum("ted,te->ed", each_TED, out_TE)
        times_E += out_TE.sum(0)
    if correction == "norm":
        layer.router.factor[:-1] = (products_E / squares_E.clamp(min=1e-30))[:-1]
        return
    mean_ED = sums_ED / times_E.clamp(min=1)[:, None]
    mean_ED[: layer.config.shared_experts] = 0
    experts.bias_down.sub_(mean_ED)
    experts.bias_down[0] += mean_ED.sum(0)


def _take_back(model: nn.Module, modes: list[tuple[nn.Module, bool]]) -> None:
    """Make the model dense again after a failure. Its hidden neurons may be in another order."""
    _restore(modes)
    layers = [layer for _, layer in moe_layers(model)]
    if layers:
        with torch.no_grad():
            for layer in layers:
                if layer.router.gate_weight == "softmax":
                    layer.router.gate_weight = "uniform"  # with which all experts are the network again
                if layer.original is not None and "bias_down" not in layer.original:
                    layer.experts.bias_down.zero_()
        unmoefy(model)


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training
