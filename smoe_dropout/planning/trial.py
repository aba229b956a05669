"""Runs of a model on calibration data at a k for each layer: losses, times and assignments."""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smoe_dropout.arguments import is_finite, require_weights
from smoe_dropout.control import layers_or_raise, moe_layers, top_k
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import require
from smoe_dropout.planning.search import Costs, Ks
from smoe_dropout.surgery.calibration import checked_pass

SAME = 1e-5  # relative difference of two losses that counts as none


class Trial:
    """Runs a model on calibration data at given ks, and keeps the losses.

    uniform: ks with the same k in every layer, or all experts of a layer that has fewer, from 1 on.
    """

    def __init__(self, model: nn.Module, passes: list[tuple[Callable[[], object], Tensor | None]]):
        self.model, self.layers = model, moe_layers(model)
        counted = [None if mask is None else int(mask.sum()) for _, mask in passes]
        require(len({count is None for count in counted}) == 1, "some of the passes have a mask and some have none: give all of them one")
        self.passes = [(run, 1 if count is None else count) for (run, _), count in zip(passes, counted, strict=True) if count != 0]
        require(bool(self.passes), "the masks of the passes count no position: they are all padding")
        experts = [layer.num_experts for _, layer in self.layers]
        self.uniform = [tuple(min(k, count) for count in experts) for k in range(1, max(experts) + 1)]
        self.one = [
            2 * (layer.experts.up[0].numel() + layer.experts.down[0].numel()) for _, layer in self.layers
        ]  # expert, in FLOPs a token
        self.losses: dict[Ks, float] = {}
        self.evaluations = 0
        self.devices = [parameter.device for parameter in model.parameters() if parameter.is_cuda]

    def loss(self, ks: Ks) -> float:
        """Mean loss at these ks, measured once."""
        if ks not in self.losses:
            self.losses[ks] = self.run(ks)
        return self.losses[ks]

    def run(self, ks: Ks, seed: int = 0, after: Callable[[], None] | None = None) -> float:
        """Run all passes at these ks, always with the same random numbers, and return the mean loss. after: called after each pass."""
        torch.manual_seed(seed)
        self.evaluations += 1
        if sys.stderr.isatty():
            print(f"\rplanning k: evaluation {self.evaluations}", end="", file=sys.stderr, flush=True)
        total, weight = 0.0, 0
        with top_k(self.model, list(ks)):
            for run, count in self.passes:
                for _, layer in self.layers:
                    layer.uses = []
                total += count * mean_loss(run(), ks)
                weight += count
                if after is not None:
                    after()
        return total / weight

    def check(self) -> None:
        """Raise ConfigError unless the passes reach every layer, and a run is the same with other random numbers."""
        ks, chosen = self.uniform[0], []
        seen: set[str] = set()

        def note() -> None:
            seen.update(name for name, layer in self.layers if layer.uses)
            chosen.append([layer.assigned for _, layer in self.layers])

        first, again = self.loss(ks), self.run(ks, 0, note)
        require(
            math.isclose(first, again, rel_tol=SAME),
            f"the same passes gave a loss of {first:.6g}, then {again:.6g}: each must start from the same state, "
            "so the first one must not continue what the last one left",
        )
        unseen = [name for name, _ in self.layers if name not in seen]
        require(not unseen, f"no pass reached {', '.join(unseen)}: the passes must run every MoE layer")
        count = len(chosen)
        self.run(ks, 1, note)
        for before, after in zip(chosen[:count], chosen[count:], strict=True):
            for (name, layer), one, other in zip(self.layers, before, after, strict=True):
                same = one is None or float((one != other).float().mean()) < 0.01
                require(
                    same,
                    f"the routing of {name!r} (router {layer.config.router!r}) differs with other random numbers: "
                    "a router that draws experts in evaluation, or passes that draw their data, cannot be planned",
                )

    def flops(self) -> Costs:
        """FLOPs of the experts of each layer at each k, on all passes: matrix products only, two operations a multiply-add."""
        tokens = [0] * len(self.layers)

        def count() -> None:
            for place, (_, layer) in enumerate(self.layers):
                tokens[place] += sum(len(use.assigned_NK) for use in layer.uses)

        self.run(self.uniform[0], after=count)
        by_layer = [
            [seen * one * layer.router.computed(k) for k in range(1, layer.num_experts + 1)]
            for seen, one, (_, layer) in zip(tokens, self.one, self.layers, strict=True)
        ]
        return Costs(by_layer, 0, float(sum(costs[-1] for costs in by_layer)))

    def assigned(self, plans: list[Ks], costs: Costs) -> list[float]:
        """FLOPs by counting the assignments of all passes, as a fraction of those at k = E."""
        found = []
        for ks in plans:
            counts = []

            def count(counts=counts) -> None:
                for one, (_, layer) in zip(self.one, self.layers, strict=True):
                    counts += [one * int((use.assigned_NK >= 0).sum()) for use in layer.uses]

            self.run(ks, after=count)
            found.append(sum(counts) / costs.whole)
        return found

    def nanoseconds(self, repeats: int) -> Costs:
        """Time of each layer at each k, and of the rest of the model, in a pass: medians of interleaved rounds after one that warms up."""
        own: dict[tuple[int, int], list[float]] = {}
        rest = []
        for number in range(repeats + 1):
            for ks in random.Random(number).sample(self.uniform, len(self.uniform)):
                whole, by_layer = self.timed(ks)
                if number == 0:
                    continue
                rest.append(whole - sum(by_layer))
                for place, (k, seconds) in enumerate(zip(ks, by_layer, strict=True)):
                    own.setdefault((place, k), []).append(seconds)
        medians = {key: round(1e9 * statistics.median(values)) for key, values in own.items()}
        by_layer = [[medians[place, k] for k in range(1, layer.num_experts + 1)] for place, (_, layer) in enumerate(self.layers)]
        return Costs(by_layer, round(1e9 * statistics.median(rest)), 1e6)

    def milliseconds(self, plans: list[Ks], repeats: int) -> list[float]:
        """Milliseconds of a pass, medians of interleaved rounds."""
        taken = {ks: [] for ks in plans}
        for number in range(repeats):
            for ks in random.Random(number).sample(list(taken), len(taken)):
                taken[ks].append(1e3 * self.timed(ks)[0])
        return [statistics.median(taken[ks]) for ks in plans]

    def timed(self, ks: Ks) -> tuple[float, list[float]]:
        """Seconds of a mean pass, and of each layer in it."""
        layers = [layer for _, layer in self.layers]
        seconds, begun = dict.fromkeys(layers, 0.0), {}

        def begin(layer: MoELayer, _inputs: tuple) -> None:
            begun[layer] = self.now()

        def end(layer: MoELayer, _inputs: tuple, _output: Tensor) -> None:
            seconds[layer] += self.now() - begun[layer]

        hooks = [hook for layer in layers for hook in (layer.register_forward_pre_hook(begin), layer.register_forward_hook(end))]
        try:
            start = self.now()
            self.run(ks)
            whole = self.now() - start
        finally:
            for hook in hooks:
                hook.remove()
        return whole / len(self.passes), [seconds[layer] / len(self.passes) for layer in layers]

    def now(self) -> float:
        """Seconds, once the accelerator has done what it was given; with one thread of a CPU without those in which it waited."""
        for device in self.devices[:1]:
            torch.cuda.synchronize(device)
        return time.perf_counter() if self.devices or torch.get_num_threads() > 1 else time.thread_time()


@contextmanager
def trial(model: nn.Module, passes: object) -> Iterator[Trial]:
    """A trial of the model in evaluation mode. Modes and random state are restored. ConfigError for arguments that are of another kind."""
    layers_or_raise(model)
    require_weights(model)
    known = isinstance(passes, Iterable) and not isinstance(passes, Tensor | str | Mapping)
    require(known, f"passes is a {type(passes).__name__}, not functions that run the model, or pairs of one and a mask")
    checked = [checked_pass((one, None) if callable(one) else one) for one in passes]
    require(bool(checked), "passes is empty: planning needs calibration data")
    runs, modes = Trial(model, checked), [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=sorted({device.index for device in runs.devices})):
            yield runs
    finally:
        for module, training in modes:
            module.training = training
        if runs.evaluations and sys.stderr.isatty():
            print(file=sys.stderr)


def mean_loss(value: object, ks: Ks) -> float:
    """The mean loss that a pass returned. ConfigError if it is none."""
    known = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    found = value.item() if known else value
    require(
        isinstance(found, int | float) and not isinstance(found, bool),
        f"a pass returned a {type(value).__name__}: it must return its mean loss, a number or a tensor with one value",
    )
    require(is_finite(found), f"the loss of a pass is {found} at k = {ks[0] if len({*ks}) == 1 else ks}: such a model cannot be planned")
    return float(found)
