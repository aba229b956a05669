"""The architecture matrix: what works for which model. `python -m tests.library.matrix` writes docs/architectures.md from real results."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smoe_dropout as sd
from tests.conftest import ROOT
from tests.library.architectures import ARCHITECTURES, Architecture

PAGE = ROOT / "docs" / "architectures.md"
EXACT = sd.SMoEConfig(num_experts=4, top_k=4, expert_init="split", gate_weight="uniform", output_scale="dense")
ROWS = {name: architecture for name, architecture in ARCHITECTURES.items() if not architecture.needs}  # of the page
COLUMNS = ("equal", "backward", "save and load", "Trainer's folder", "generate with cache")
HEADER = f"""# Architectures

Tiny models of {len(ROWS)} kinds, each converted by `sd.moefy(model, SMoEConfig(...))` without naming any module. FFNs are found
by structure, so an architecture that is not listed works as one that is. `python -m tests.library.matrix` writes this page, and a test
compares it with the results.

- **FFNs**: how many were converted.
- **equal**: with all experts active (`split`, uniform weights, output scale `dense`) the outputs equal the dense model's, to 1e-6.
- **backward**: all experts have finite gradients.
- **save and load**: `sd.save_pretrained` and `sd.from_pretrained` give bit-equal outputs (`sd.save_model` and `sd.load_weights` for models
  that are not of transformers).
- **Trainer's folder**: `sd.from_pretrained` loads what the model's own `save_pretrained`, and so the Trainer, writes.
- **generate with cache**: gives the same tokens as without. – where it does not apply.

| model | class | FFNs | {" | ".join(COLUMNS)} |
|---|---|---|{"---|" * len(COLUMNS)}
"""


def tensors(output: Any) -> Iterator[Tensor]:
    """All floating-point tensors of a model's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from tensors(part)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs without gradients; transformers models are not asked for a cache."""
    with torch.no_grad():
        return list(tensors(model(**inputs)))


def unavailable(architecture: Architecture) -> str | None:
    """Package that the architecture needs and that cannot be imported here."""
    for package in ("transformers", *architecture.needs):
        try:
            if importlib.util.find_spec(package) is None:
                return package
        except (ImportError, ValueError):
            return package
    return None


@functools.cache
def outcome(name: str) -> dict[str, str]:
    """Cells of a row by column: "yes", "no" with the error, or "–"; of a refused model the messages of moefy and adopt."""
    architecture = ARCHITECTURES[name]
    model, inputs = architecture.build(), architecture.inputs()
    cells = {"class": type(model).__name__}
    dense = outputs(model, inputs) if architecture.refused is None else []
    try:
        sd.moefy(model, EXACT)
    except sd.ConfigError as error:
        return cells | {"refused": str(error), "adopted": _tried(sd.adopt, model)}
    cells["FFNs"] = str(len(sd.moe_layers(model)))
    found = outputs(model, inputs)
    with sd.top_k(model, 1):
        sparse = outputs(model, inputs)
    worst = max(((one - other).norm() / one.norm().clamp(min=1e-9)).item() for one, other in zip(dense, found, strict=True))
    differs = any(not torch.allclose(one, other, atol=1e-3) for one, other in zip(dense, sparse, strict=True))
    cells["equal"] = "yes" if worst <= 1e-6 and differs else f"no: {worst:.1e}"
    own = hasattr(model, "save_pretrained") and hasattr(model, "config")
    with tempfile.TemporaryDirectory() as folder:
        cells["save and load"] = _tried(_reloaded if own else _refilled, architecture, model, inputs, found, Path(folder) / "ours")
        cells["Trainer's folder"] = _tried(_of_trainer, architecture, model, inputs, found, Path(folder) / "theirs") if own else "–"
    generative = own and model.can_generate()
    cells["generate with cache"] = _tried(_generates, architecture, model, inputs, found, None) if generative else "–"
    cells["backward"] = _tried(_backward, architecture, model, inputs, found, None)
    return cells


def _tried(check, *given) -> str:
    try:
        return "yes" if check(*given) else "no: not equal"
    except Exception as error:  # a row tells every failure
        return f"no: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _same(model: nn.Module, inputs: dict[str, Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(outputs(model, inputs), expected, strict=True))


def _reloaded(_architecture, model, inputs, expected, folder) -> bool:
    sd.save_pretrained(model, folder)
    return _same(sd.from_pretrained(folder), inputs, expected)


def _refilled(architecture, model, inputs, expected, folder) -> bool:
    sd.save_model(model, folder)
    fresh = architecture.build()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    return _same(sd.load_weights(sd.moefy(fresh, EXACT), folder).eval(), inputs, expected)


def _of_trainer(_architecture, model, inputs, expected, folder) -> bool:
    model.save_pretrained(folder)
    return _same(sd.from_pretrained(folder), inputs, expected)


def _generates(_architecture, model, inputs, _expected, _folder) -> bool:
    given = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder_")}
    with sd.top_k(model, 2):
        texts = [model.generate(**given, max_new_tokens=5, do_sample=False, use_cache=use, pad_token_id=0) for use in (True, False)]
    return torch.equal(*texts)


def _backward(_architecture, model, inputs, _expected, _folder) -> bool:
    loss = sum(tensor.square().mean() for tensor in tensors(model.train()(**inputs)))
    loss.backward()
    grads = [parameter.grad for _, layer in sd.moe_layers(model) for parameter in (layer.experts.up, layer.experts.down)]
    return all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def row(name: str) -> str:
    """The architecture's line of the page."""
    cells = outcome(name)
    if "refused" in cells:
        middle = f"refused: {ARCHITECTURES[name].said}"
        return f"| {name} | {cells['class']} | – | {middle} |{' |' * (len(COLUMNS) - 1)}"
    return f"| {name} | {cells['class']} | {cells['FFNs']} | {' | '.join(cells[column].split(':')[0] for column in COLUMNS)} |"


def main() -> None:
    """Write the page, and print the errors of what fails."""
    importlib.import_module("transformers").logging.set_verbosity_error()
    for name in ROWS:
        for column in COLUMNS:
            if (cell := outcome(name).get(column, "–")) not in ("yes", "–"):
                print(f"{name}, {column}: {cell}")
    PAGE.write_text(HEADER + "\n".join(map(row, ROWS)) + "\n")


if __name__ == "__main__":
    main()
