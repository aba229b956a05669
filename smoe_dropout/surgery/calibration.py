"""What the experts of a model do on calibration text or a task's rows: how often each is used, with what gate weight, and what the router
says of a sample of tokens. One pass collects it, in a small file that every method of surgery reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smoe_dropout.control import get_top_k, moe_layers, top_k
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError, require
from smoe_dropout.routers import LinearRouter


class LayerCalibration(NamedTuple):
    """Of one MoE layer. usage_E: each expert's share of the assignments; weight_E: of the gate weight; both sum to 1. Of S tokens, the same
    in every layer: logits_SE, the router's, and inputs_SD, from which `Experts.each` makes every expert's output.
    """

    usage_E: Tensor
    weight_E: Tensor
    logits_SE: Tensor
    inputs_SD: Tensor


@dataclass(frozen=True)
class Calibration:
    """names: of the MoE layers, whose calibrations stand in `layers`. k: active experts. tokens: that were counted."""

    names: tuple[str, ...]
    layers: tuple[LayerCalibration, ...]
    k: int
    tokens: int

    @property
    def usage(self) -> list[Tensor]:
        """Of every layer, each expert's share of the assignments [E]."""
        return [layer.usage_E for layer in self.layers]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        tensors = {f"{index}.{name}": tensor for index, layer in enumerate(self.layers) for name, tensor in layer._asdict().items()}
        said = {"names": self.names, "k": self.k, "tokens": self.tokens}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"calibration": json.dumps(said)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """ConfigError for a file that cannot be read, or is of something else."""
        try:
            with safe_open(path, "pt") as file:
                said = json.loads((file.metadata() or {})["calibration"])
                layers = [
                    LayerCalibration(*(file.get_tensor(f"{index}.{name}") for name in LayerCalibration._fields))
                    for index in range(len(said["names"]))
                ]
            return cls(tuple(said["names"]), tuple(layers), said["k"], said["tokens"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a calibration: {error}") from None

    def check_of(self, model: nn.Module) -> None:
        """ConfigError unless the model has MoE layers of these names and sizes."""
        ours = {
            name: (*usage_E.shape, inputs_SD.shape[1]) for name, (usage_E, _, _, inputs_SD) in zip(self.names, self.layers, strict=True)
        }
        theirs = {name: layer.router.weight.shape for name, layer in cuttable_layers(model)}
        require(ours == theirs, "the calibration is of another model: its MoE layers have other names, numbers of experts or widths")


def cuttable_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """The MoE layers with their names. ConfigError if there are none, or their routers have no row for each expert."""
    layers = moe_layers(model)
    require(bool(layers), f"{type(model).__name__} has no MoE layers: surgery is for models with experts")
    for _, layer in layers:
        require(
            isinstance(layer.router, LinearRouter),
            f"router {layer.config.router!r} has no row for each expert: it tells no expert from another, and cannot be cut",
        )
    return layers


@torch.no_grad()
def calibrate(
    model: nn.Module, passes: Iterable[tuple[Callable[[], object], Tensor | None]], k: int | None = None, seed: int = 0, sample: int = 256
) -> Calibration:
    """Watches the experts while the model reads.

    passes: what runs the model once, and a bool mask of the positions that count, in the order in which the MoE layers see them; None: all.
    k: active experts meanwhile, None: as the model has it; at k = E all are used alike. seed: decides which `sample` tokens are kept.
    The model is in evaluation mode meanwhile, and afterwards as before. ConfigError for a model that surgery cannot be done on, and where
    no position counts or reaches a layer; ValueError for a k it has not and a mask of another size.
    """
    layers, modes = cuttable_layers(model), [(module, module.training) for module in model.modules()]
    k = get_top_k(model) if k is None else k
    watches = [_Watch(layer, torch.Generator().manual_seed(seed), sample) for _, layer in layers]
    with top_k(model, k):
        hooks = [layer.experts.register_forward_pre_hook(watch.see) for (_, layer), watch in zip(layers, watches, strict=True)]
        model.eval()
        try:
            for run, real in passes:
                for watch in watches:
                    watch.real = real
                run()
        finally:
            for module, training in modes:
                module.training = training
            for hook in hooks:
                hook.remove()
    tokens = watches[0].tokens
    require(any(watch.tokens for watch in watches), "no position of the calibration counts: give text, or rows that are not all padding")
    unseen = [name for (name, _), watch in zip(layers, watches, strict=True) if not watch.tokens]
    require(not unseen, f"no position of the calibration reached {', '.join(unseen)}: the passes have to run every MoE layer")
    return Calibration(tuple(name for name, _ in layers), tuple(watch.result() for watch in watches), k, tokens)


class _Watch:
    """What went to the experts of one layer. Every token gets a random key; those of the smallest keys are the sample."""

    def __init__(self, layer: MoELayer, draw: torch.Generator, sample: int):
        self.layer, self.draw, self.sample, self.tokens = layer, draw, sample, 0
        self.real: Tensor | None = None
        self.counts_E, self.weight_E = torch.zeros(2, layer.num_experts, dtype=torch.float64)
        self.keys_S, self.inputs_SD = (
            torch.empty(0, dtype=torch.float64),
            layer.router.weight.new_empty(0, layer.router.weight.shape[1]).cpu(),
        )

    def see(self, _experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        """A forward pre-hook of the experts."""
        x_ND, indices_NK, weights_NK = inputs
        if self.real is not None:
            if self.real.numel() != len(x_ND):
                raise ValueError(f"the mask says of {self.real.numel()} positions whether they count, and the model read {len(x_ND)}")
            x_ND, indices_NK, weights_NK = (tensor[self.real.flatten()] for tensor in inputs)
        self.tokens += len(x_ND)
        chosen_M = indices_NK.flatten().cpu()
        self.counts_E += torch.bincount(chosen_M, minlength=len(self.counts_E))
        self.weight_E.scatter_add_(0, chosen_M, weights_NK.flatten().double().cpu())
        keys_S = torch.cat([self.keys_S, torch.rand(len(x_ND), generator=self.draw, dtype=torch.float64)])
        kept_S = keys_S.sort().indices[: self.sample]
        self.keys_S, self.inputs_SD = keys_S[kept_S], torch.cat([self.inputs_SD, x_ND.to(self.inputs_SD)])[kept_S]

    def result(self) -> LayerCalibration:
        router = self.layer.router
        logits_SE = router.logits(self.inputs_SD.to(router.weight.device)).cpu()
        return LayerCalibration(*(sums_E / sums_E.sum() for sums_E in (self.counts_E, self.weight_E)), logits_SE, self.inputs_SD)
