"""Calibration data for surgery: each expert's usage, gate weight and outputs, and inputs and router logits of a sample of tokens.

Collected while the model reads a text or the rows of a task, and stored in a small file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smoe_dropout import arguments
from smoe_dropout.arguments import SEEDS, boolean, integer, require_weights
from smoe_dropout.control import get_top_k, moe_layers, top_k
from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.files import parse_json, writing_tensors
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError, require
from smoe_dropout.precision import without_autocast
from smoe_dropout.routers import LogitRouter


class LayerCalibration(NamedTuple):
    """Calibration of one MoE layer.

    usage_E: each expert's fraction of the assignments, summing to 1. weight_E: its fraction of the gate weight, summing to 1.
    logits_SE, inputs_SD: router logits and inputs of S sampled tokens, the same tokens in every layer.
    saliency_E: mean, over the tokens that chose the expert, of its gate weight times the Euclidean norm of its output; 0 without tokens.
    outputs_ED: mean output of the expert over all tokens. products_EE: sums over all tokens of the products of two experts' router logits.
    These are None if they were not collected, as by earlier versions.
    """

    usage_E: Tensor
    weight_E: Tensor
    logits_SE: Tensor
    inputs_SD: Tensor
    saliency_E: Tensor | None = None
    outputs_ED: Tensor | None = None
    products_EE: Tensor | None = None

    @property
    def collected(self) -> dict[str, Tensor]:
        """The tensors that were collected, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    def without(self, shared: int) -> LayerCalibration:
        """Calibration of the experts behind the first `shared`, whose fractions then sum to less than 1."""
        suffixes = {name: name.rpartition("_")[2] for name in self.collected}
        routed = {name: tuple(slice(shared if size == "E" else 0, None) for size in suffix) for name, suffix in suffixes.items()}
        return self._replace(**{name: tensor[routed[name]] for name, tensor in self.collected.items()})

    def of_outputs(self, name: str) -> Tensor:
        """`saliency_E` or `outputs_ED`. ConfigError if it was not collected."""
        require(getattr(self, name) is not None, "the calibration has no outputs of the experts: make it again with outputs=True")
        return getattr(self, name)


OUTPUT_FIELDS = tuple(LayerCalibration._field_defaults)


@dataclass(frozen=True)
class Calibration:
    """Calibration of a model.

    names: of the MoE layers. layers: their calibrations. k: active experts, by layer name if they differ. tokens: number of tokens counted.
    """

    names: tuple[str, ...]
    layers: tuple[LayerCalibration, ...]
    k: int | dict[str, int]
    tokens: int

    @property
    def usage(self) -> list[Tensor]:
        """Each expert's fraction of the assignments [E], by layer."""
        return [layer.usage_E for layer in self.layers]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        tensors = {f"{index}.{name}": tensor for index, layer in enumerate(self.layers) for name, tensor in layer.collected.items()}
        header = {"names": self.names, "k": self.k, "tokens": self.tokens}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with writing_tensors(path := arguments.path("path", path)):
            save_file(tensors, path, {"calibration": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file written by `save`. ConfigError if it cannot be read or is not a calibration."""
        path = arguments.path("path", path)
        try:
            with safe_open(path, "pt") as file:
                header = parse_json((file.metadata() or {})["calibration"], "its header")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._of(header, tensors)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a calibration: {error}") from None

    @classmethod
    def _of(cls, header: dict, tensors: dict[str, Tensor]) -> Calibration:
        names = header["names"]
        require(isinstance(names, list) and all(isinstance(name, str) for name in names), "names is not a list of names")
        fields = [name for name in LayerCalibration._fields if name not in OUTPUT_FIELDS or f"0.{name}" in tensors]
        expected = {f"{index}.{name}" for index in range(len(names)) for name in fields}
        require(bool(names) and tensors.keys() == expected, f"it has not the tensors of {len(names)} layers")
        k, tokens = header["k"], integer("tokens", header["tokens"], 1, None)
        k = {name: integer("k", k[name]) for name in names} if isinstance(k, dict) else integer("k", k)
        layers = [LayerCalibration(**{name: tensors[f"{index}.{name}"] for name in fields}) for index in range(len(names))]
        for name, layer in zip(names, layers, strict=True):
            suffixes = [(entry.rpartition("_")[2], tensor.shape) for entry, tensor in layer.collected.items()]
            sizes = {pair for suffix, shape in suffixes for pair in zip(suffix, shape, strict=False)}  # of E, S and D, one each
            fits = len(sizes) == len("ESD") and all(size > 0 for _, size in sizes) and all(len(a) == len(b) for a, b in suffixes)
            require(fits, f"the tensors of {name!r} do not fit together")
        return cls(tuple(names), tuple(layers), k, tokens).checked()

    def checked(self) -> Calibration:
        """This calibration. ConfigError if its numbers are not finite, as those of a model with NaN, or are not fractions."""
        for name, layer in zip(self.names, self.layers, strict=True):
            finite = all(bool(tensor.isfinite().all()) for tensor in layer.collected.values())
            require(finite, f"the calibration of {name!r} has numbers that are not finite")
            for shares_E in (layer.usage_E, layer.weight_E):
                fractions = shares_E.is_floating_point() and bool((shares_E >= 0).all()) and abs(float(shares_E.sum()) - 1) < 1e-3
                require(fractions, f"the usage of experts of {name!r} does not sum to 1")
        return self

    def check_of(self, model: nn.Module) -> None:
        """Raise ConfigError unless the model has MoE layers with these names and sizes."""
        ours = {name: (*layer.usage_E.shape, layer.inputs_SD.shape[1]) for name, layer in zip(self.names, self.layers, strict=True)}
        theirs = {name: layer.experts.bias_down.shape for name, layer in cuttable_layers(model)}
        require(ours == theirs, "the calibration belongs to another model: names, numbers of experts or widths of its MoE layers differ")


def cuttable_layers(model: nn.Module) -> list[tuple[str, MoELayer]]:
    """Names and modules of the MoE layers. ConfigError if there are none, or a router has no row per expert."""
    layers = moe_layers(model)
    require(bool(layers), f"{type(model).__name__} has no MoE layers: surgery needs a model with experts")
    for _, layer in layers:
        require(
            isinstance(layer.router, LogitRouter),
            f"router {layer.config.router!r} has no row per expert, so it cannot be reduced to fewer experts",
        )
        require(layer.reducible, f"{type(layer).__name__} routes by experts of the layer before: surgery needs the option residual = False")
    return layers


@torch.no_grad()
def calibrate(
    model: nn.Module,
    passes: Iterable[tuple[Callable[[], object], Tensor | None]],
    k: int | None = None,
    seed: int = 0,
    sample: int = 256,
    outputs: bool = True,
) -> Calibration:
    """Run the model and record how its experts are used.

    passes: pairs of a function that runs the model once and a bool mask of the positions to count, in the order in which the MoE layers see
        them; None counts all.
    k: active experts; None: the model's k. At k = E all experts are used equally.
    seed: of the choice of `sample` tokens whose inputs are kept.
    outputs: whether to measure the experts' outputs, which "reap" and "hc_smoe" need: every expert computes every token once more, besides
        the k of each in the passes.

    The model runs in evaluation mode; modes and k are restored afterwards. Raises ConfigError for a model that surgery does not support,
    and if no position counts or reaches a layer; ValueError for an invalid k or a mask of the wrong size.
    """
    layers, modes = cuttable_layers(model), [(module, module.training) for module in model.modules()]
    require_weights(model)
    seed, sample, outputs = integer("seed", seed, *SEEDS), integer("sample", sample), boolean("outputs", outputs)
    require(
        isinstance(passes, Iterable) and not isinstance(passes, Tensor),
        f"passes is a {type(passes).__name__}, not pairs of a function and a mask",
    )
    k = get_top_k(model) if k is None else integer("k", k)
    watches = [_Watch(layer, torch.Generator().manual_seed(seed), sample, outputs) for _, layer in layers]
    with top_k(model, k):
        hooks = [layer.experts.register_forward_pre_hook(watch.see) for (_, layer), watch in zip(layers, watches, strict=True)]
        model.eval()
        try:
            for one in passes:
                run, real = checked_pass(one)
                for watch in watches:
                    watch.real = real
                run()
        finally:
            for module, training in modes:
                module.training = training
            for hook in hooks:
                hook.remove()
    tokens = watches[0].tokens
    require(any(watch.tokens for watch in watches), "the calibration data has no positions to count: it is empty or all padding")
    unseen = [name for (name, _), watch in zip(layers, watches, strict=True) if not watch.tokens]
    require(not unseen, f"no position of the calibration data reached {', '.join(unseen)}: the passes must run every MoE layer")
    return Calibration(tuple(name for name, _ in layers), tuple(watch.result() for watch in watches), k, tokens).checked()


def checked_pass(one: object) -> tuple[Callable[[], object], Tensor | None]:
    """A pair that `calibrate` takes. ConfigError for anything else: a mask of numbers would count other positions."""
    fits = isinstance(one, tuple | list) and len(one) == 2 and callable(one[0])
    require(fits, "each of the passes must be a pair of a function that runs the model and a mask or None")
    run, real = one
    masks = real is None or (isinstance(real, Tensor) and real.dtype == torch.bool)
    require(masks, f"the mask of a pass is a {getattr(real, 'dtype', type(real).__name__)}: it must be a bool tensor, or None for all")
    return run, real


def require_finite(layers: Sequence[MoELayer]) -> None:
    """Raise ConfigError for experts or routers with values that are not finite, of which no order or mean means anything."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            require(bool(parameter.isfinite().all()), f"{name} of an MoE layer has values that are not finite: the training has diverged")


class _Watch:
    """Statistics of one layer's experts. Every token gets a random key; the tokens with the smallest keys form the sample."""

    def __init__(self, layer: MoELayer, draw: torch.Generator, sample: int, outputs: bool):
        self.layer, self.draw, self.sample, self.outputs, self.tokens = layer, draw, sample, outputs, 0
        self.real: Tensor | None = None
        self.counts_E, self.weight_E, self.reached_E, self.saliency_E = torch.zeros(4, layer.num_experts, dtype=torch.float64)
        (_, D), dtype = layer.experts.bias_down.shape, torch.promote_types(layer.experts.bias_down.dtype, torch.float32)
        self.outputs_ED = torch.zeros(layer.num_experts, D, dtype=torch.float64)
        self.products_EE = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
        self.keys_S, self.inputs_SD = torch.empty(0, dtype=torch.float64), torch.empty(0, D, dtype=dtype)

    def see(self, _experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        """Count a pass; a forward pre-hook of the experts."""
        x_ND, indices_NK, weights_NK = inputs
        if self.real is not None:
            if self.real.numel() != len(x_ND):
                raise ValueError(f"the mask has {self.real.numel()} positions, but the model read {len(x_ND)}")
            x_ND, indices_NK, weights_NK = (tensor[self.real.flatten()] for tensor in inputs)
        self.tokens += len(x_ND)
        logits_NE = self.layer.router.logits(x_ND).double()
        self.products_EE += (logits_NE.T @ logits_NE).cpu()
        chosen_M = indices_NK.flatten().cpu()
        self.counts_E += torch.bincount(chosen_M, minlength=len(self.counts_E))
        self.weight_E.scatter_add_(0, chosen_M, weights_NK.flatten().double().cpu())
        keys_S = torch.cat([self.keys_S, torch.rand(len(x_ND), generator=self.draw, dtype=torch.float64)])
        kept_S = keys_S.sort().indices[: self.sample]
        self.keys_S, self.inputs_SD = keys_S[kept_S], torch.cat([self.inputs_SD, x_ND.to(self.inputs_SD)])[kept_S]
        if self.outputs:
            with without_autocast(x_ND.device.type):
                self.measure(x_ND, indices_NK, weights_NK)

    def measure(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> None:
        """Add up the experts' outputs, in float32 or higher, and their weighted norms at the tokens that chose them.

        A gate weight of 0 is that of a token over an expert's capacity, which does not count.
        """
        experts, dtype = self.layer.experts, torch.promote_types(x_ND.dtype, torch.float32)
        weights, x_ND = experts.weights(experts.up.dtype), x_ND.to(dtype)
        for index in range(self.layer.num_experts):
            up_HD, bias_up_H, down_HD, bias_down_D = (stacked[index].to(dtype) for stacked in weights[:4])
            hidden_NH = ACTIVATIONS[weights.activation].apply(F.linear(x_ND, up_HD, bias_up_H))
            self.outputs_ED[index] += (hidden_NH.sum(0) @ down_HD + len(x_ND) * bias_down_D).double().cpu()
            token_M, slot_M = ((indices_NK == index) & (weights_NK != 0)).nonzero(as_tuple=True)
            norm_M = (hidden_NH[token_M] @ down_HD + bias_down_D).norm(dim=1)
            self.saliency_E[index] += (weights_NK[token_M, slot_M] * norm_M).sum().double().cpu()
            self.reached_E[index] += len(token_M)

    def result(self) -> LayerCalibration:
        """Normalised statistics, and router logits of the sample."""
        logits_SE = self.layer.router.logits(self.inputs_SD.to(self.layer.experts.bias_down.device)).cpu()
        shares = (sums_E / sums_E.sum() for sums_E in (self.counts_E, self.weight_E))
        found = LayerCalibration(*shares, logits_SE, self.inputs_SD, products_EE=self.products_EE.float())
        if not self.outputs:
            return found
        saliency_E, outputs_ED = self.saliency_E / self.reached_E.clamp(min=1), self.outputs_ED / self.tokens
        return found._replace(saliency_E=saliency_E.float(), outputs_ED=outputs_ED.float())
