"""Microscope: what the experts and routers of a model do on a text.

    report = sd.examine(model, [lambda: (model(ids).logits[:, :-1], ids[:, 1:])], ks=(1, 2, 4))
    print(report, report.layers[0].load_entropy, report.findings)

Only sums over tokens and the chosen experts' numbers are kept, whatever the length of the text. docs/microscope.md defines each measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import SEEDS, boolean, integer, is_finite, require_weights
from smoe_dropout.control import get_top_k, layers_or_raise, top_k
from smoe_dropout.layer import MoELayer
from smoe_dropout.microscope.measures import (
    Predictions,
    alignment,
    co_activation,
    effective_rank,
    fluctuation,
    load_entropy,
    load_variation,
    mean_of_pairs,
    saturation,
)
from smoe_dropout.microscope.report import DEAD, LayerReport, Quality, Report
from smoe_dropout.microscope.watch import FEWEST, Watch, routing_by, without_first
from smoe_dropout.options import require
from smoe_dropout.surgery.calibration import checked_pass

__all__ = ["FEWEST", "LayerReport", "Quality", "Report", "examine", "fluctuation", "saturation"]

SLICE = 1 << 20  # weights of an expert that are compared at a time


@torch.no_grad()
def examine(
    model: nn.Module,
    passes: Iterable[object],
    k: int | None = None,
    ks: Sequence[int] = (),
    without: bool = True,
    seed: int = 0,
    sample: int = 256,
) -> Report:
    """Run the model on a text and measure what its experts and routers do.

    passes: functions that run the model once, or pairs of one and a bool mask of the positions to count, as for `calibrate`. They run in
    order, several times, so the first must not continue what the last one left. A pass may return its logits [..., V] and targets [...],
    where -100 does not count, for loss and calibration; or its mean loss; anything else means that there is no loss.
    k: active experts; None: the model's. ks: further numbers at which loss and calibration are measured.
    without: whether to measure the loss without first experts: for each layer all passes run once more.
    seed: of torch, before the passes at each k, and of the sample. sample: tokens of each pass for which all experts are computed and
    compared, at least 4.

    The model runs in evaluation mode; modes and random state are restored. ConfigError for a model without MoE layers, and if no position
    counts or reaches a layer.
    """
    named = layers_or_raise(model)
    require_weights(model)
    layers, modes = [layer for _, layer in named], [(module, module.training) for module in model.modules()]
    most = max(layer.num_experts for layer in layers)
    k, without = None if k is None else integer("k", k, 1, most), boolean("without", without)
    ks = [integer("k", one, 1, most) for one in ks]
    seed, sample = integer("seed", seed, *SEEDS), integer("sample", sample, FEWEST)
    require(isinstance(passes, Iterable) and not isinstance(passes, Tensor | str), f"passes is a {type(passes).__name__}, not functions")
    checked = [checked_pass((one, None) if callable(one) else one) for one in passes]
    watches = {layer: Watch(layer, seed, sample) for layer in layers}

    def mask(real: Tensor | None) -> None:
        for watch in watches.values():
            watch.real = real

    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices):

            def quality(at: int | None) -> Quality:
                with selected(model, at):
                    return Quality(get_top_k(model), *_run(checked, seed, mask).result())

            with routing_by(layers, lambda layer, route, x: watches[layer].see(route, x)):
                own = quality(k)
            unseen = [name for name, layer in named if not watches[layer].tokens]
            require(not unseen, f"no position of the passes counts in {', '.join(unseen)}: they must run every MoE layer on some text")
            rises = [
                _rise(model, layer, name, checked, seed, k, own.loss) if without and own.loss is not None else None for name, layer in named
            ]
            qualities = {str(own.k): own} | {str(one): quality(one) for one in ks if one != own.k}
    finally:
        for module, training in modes:
            module.training = training
    first = watches[layers[0]]
    return Report(
        k=own.k,
        tokens=first.tokens,
        sampled=first.sampled,
        layers=tuple(_layer_report(name, watches[layer], rise) for (name, layer), rise in zip(named, rises, strict=True)),
        by_k=tuple(sorted(qualities.values(), key=lambda one: one.k if isinstance(one.k, int) else 0)),
        routes=tuple(_joined(watches[layer].routes) for layer in layers),
    )


@contextmanager
def selected(model: nn.Module, k: int | dict[str, int] | None):
    """Context manager that activates k experts, or what is selected anyway."""
    with nullcontext() if k is None else top_k(model, k):
        yield


def _run(passes: Sequence[tuple[Callable[[], object], Tensor | None]], seed: int, mask: Callable[[Tensor | None], None]) -> Predictions:
    """Run all passes with the same random numbers, and add up their predictions."""
    torch.manual_seed(seed)
    found = Predictions()
    for run, real in passes:
        mask(real)
        value = run()
        if isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
            logits, targets = value
            fits = logits.shape[:-1] == targets.shape and not targets.is_floating_point()
            require(fits, f"a pass returned logits {list(logits.shape)} for targets {list(targets.shape)}: give [..., V] and [...]")
            found.add(logits, targets)
        elif is_finite(value) or (isinstance(value, Tensor) and value.numel() == 1):
            found.add_loss(float(value), 1 if real is None else int(real.sum()))
    return found


def _rise(model: nn.Module, layer: MoELayer, name: str, passes: Sequence, seed: int, k: int | None, loss: float) -> float:
    """Loss of the passes in which the tokens lose their first expert of this layer, less that of the whole model."""
    with selected(model, k):  # one more, of which the first is lost; tokens that differ in their number just lose it
        at = {name: min(layer.top_k + (not layer.variable), layer.num_experts)}
        with routing_by([layer], without_first), top_k(model, at):
            return _run(passes, seed, lambda real: None).result()[0] - loss


def _layer_report(name: str, watch: Watch, rise: float | None) -> LayerReport:
    count_E, E = watch.counts_EE.diagonal(), len(watch.counts_EE)
    load_E = count_E / count_E.sum().clamp(min=1)
    cosine_EE, cka_EE = watch.cosines_EE / max(watch.sampled, 1), alignment(watch.dependence_EE)
    return LayerReport(
        name=name,
        experts=watch.layer.num_experts,
        shared=watch.shared,
        mean_k=count_E.sum().item() / watch.tokens,
        load=load_E.tolist(),
        load_entropy=load_entropy(load_E),
        load_variation=load_variation(load_E),
        load_max=load_E.max().item() * E,
        dead=[watch.shared + expert for expert in (load_E * E < DEAD).nonzero()[:, 0].tolist()],
        confidence=watch.sure / watch.scored if watch.scored else None,
        margin=watch.margin / watch.bounded if watch.bounded else None,
        co_activation=co_activation(watch.counts_EE).tolist(),
        cosine=cosine_EE.tolist(),
        cka=cka_EE.tolist(),
        mean_cosine=mean_of_pairs(cosine_EE) if watch.sampled else None,
        mean_cka=mean_of_pairs(cka_EE) if watch.sampled else None,
        effective_rank=effective_rank(watch.gram_EE),
        weight_rank=effective_rank(_weight_products(watch.layer)),
        loss_without_first=rise,
    )


def _weight_products(layer: MoELayer) -> Tensor:
    """Inner products of the experts' weights and biases, each expert's as one vector [E, E]."""
    found_EE = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
    for stacked in layer.experts.weights(layer.experts.up.dtype)[:4]:
        for part_EM in stacked.flatten(1).split(SLICE, 1):
            part_EM = part_EM.to(torch.promote_types(part_EM.dtype, torch.float32))
            found_EE += (part_EM @ part_EM.t()).double().cpu()
    return found_EE


def _joined(routes: list[Tensor]) -> Tensor:
    """Routes of all passes [N, K], those with fewer experts padded by -1."""
    most = max(route_NK.shape[1] for route_NK in routes)
    return torch.cat([nn.functional.pad(route_NK, (0, most - route_NK.shape[1]), value=-1) for route_NK in routes])
