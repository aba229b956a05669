"""A plan: k of each MoE layer, with what it costs and the loss that was measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smoe_dropout import arguments
from smoe_dropout.arguments import integer, is_finite, number, shown
from smoe_dropout.files import read_object
from smoe_dropout.layer import MoELayer
from smoe_dropout.options import ConfigError, require

FORMAT = 1  # of a saved plan
FLOPS, MILLISECONDS = "flops", "milliseconds"


@dataclass(frozen=True)
class Plan(Mapping[str, int]):
    """k by layer name, a mapping that `top_k`, `set_top_k` and `slim` take.

    sizes: of each layer, its experts, their hidden units and the model's width. unit: "flops", a fraction of the experts' FLOPs at k = E,
    or "milliseconds" of a pass; budget, predicted and measured are in it: what was allowed, the cost by the tables that the plan was made
    from, and that of the finished plan (FLOPs by counting assignments). loss: mean on the calibration data. uniform: the largest k for all
    layers within the budget by the same tables, with its loss and its measured cost. evaluations: how often the passes were run.
    """

    k: dict[str, int]
    sizes: dict[str, tuple[int, int, int]]
    unit: str
    budget: float
    predicted: float
    measured: float
    loss: float
    uniform: int
    uniform_measured: float
    uniform_loss: float
    evaluations: int

    def __getitem__(self, name: str) -> int:
        return self.k[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.k)

    def __len__(self) -> int:
        return len(self.k)

    def __str__(self) -> str:
        unit = "of the experts' FLOPs" if self.unit == FLOPS else "ms"
        return (
            f"k = {', '.join(map(str, self.k.values()))}: {self.measured:.4g} {unit}, loss {self.loss:.4f}; "
            f"k = {self.uniform} everywhere: {self.uniform_measured:.4g}, loss {self.uniform_loss:.4f}"
        )

    def check_of(self, layers: Sequence[tuple[str, MoELayer]]) -> None:
        """Raise ConfigError unless these are the MoE layers of a model like the planned one."""
        require(
            self.sizes == sizes_of(layers),
            "the plan belongs to another model: names, numbers of experts or widths of its MoE layers differ",
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        content = {"plan": FORMAT, **dataclasses.asdict(self)}
        arguments.path("path", path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a file written by `save`. ConfigError if it cannot be read or is not a plan."""
        values = read_object(path := arguments.path("path", path))
        try:
            require(values.pop("plan", None) == FORMAT, f"it is not of format {FORMAT}")
            require(values.keys() == {field.name for field in dataclasses.fields(cls)}, "its fields are not those of a plan")
            return cls(**values | {"sizes": {name: tuple(sizes) for name, sizes in values["sizes"].items()}}).checked()
        except (TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as a plan: {error}") from None

    def checked(self) -> Plan:
        """This plan. ConfigError for a k that a layer has no experts for, and for numbers out of range."""
        require(isinstance(self.k, dict) and bool(self.k) and self.k.keys() == self.sizes.keys(), "k and sizes are not of the same layers")
        for name, k in self.k.items():
            sizes = [integer("sizes", size) for size in self.sizes[name]]
            require(len(sizes) == 3 and integer("k", k) <= sizes[0], f"k = {k} of {name!r} is more than its experts")
        require(self.unit in (FLOPS, MILLISECONDS), f"unit = {shown(self.unit)} is neither {FLOPS!r} nor {MILLISECONDS!r}")
        for name in ("budget", "predicted", "measured", "uniform_measured"):
            number(name, getattr(self, name))
        require(is_finite(self.loss) and is_finite(self.uniform_loss), "a loss is not a finite number")
        integer("uniform", self.uniform), integer("evaluations", self.evaluations)
        return self


def sizes_of(layers: Sequence[tuple[str, MoELayer]]) -> dict[str, tuple[int, int, int]]:
    """Experts, hidden units of an expert with those of its gate, and width of the model, by layer name."""
    biases = {name: (layer.experts.bias_up, layer.experts.bias_down) for name, layer in layers}  # maps may be compressed
    return {name: (len(up_EH), up_EH.shape[1], down_ED.shape[1]) for name, (up_EH, down_ED) in biases.items()}
