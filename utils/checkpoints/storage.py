"""Atomic checkpoints: a folder of safetensors, written under another name, synced, then renamed, and verified before it is read."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smoe_dropout.files import writing_tensors
from smoe_dropout.io import load_weights
from utils import documents
from utils.checkpoints.manifest import MANIFEST, REMEDY, WEIGHTS, name_of, steps, verify
from utils.documents import Content, Damaged, content_of
from utils.errors import UserError


class Writer:
    """Writes a checkpoint. Every process may `add` files; the main process calls `finish` when all have."""

    def __init__(self, root: Path, step: int, is_main: bool):
        self.final, self.partial = root / name_of(step), root / f".{name_of(step)}.partial"
        if is_main:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)

    def add(self, name: str, tensors: dict[str, Tensor]) -> None:
        with writing_tensors(self.partial / name):
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, self.partial / name)

    def add_json(self, name: str, value: Any) -> None:
        (self.partial / name).write_text(json.dumps(documents.seal(value), indent=1))

    def finish(self) -> None:
        files = sorted(self.partial.iterdir())
        with ThreadPoolExecutor() as pool:
            manifest = dict(zip((file.name for file in files), pool.map(_synced, files), strict=True))
        documents.write(self.partial / MANIFEST, manifest)
        if self.final.exists():  # a damaged checkpoint of the same step
            remove(self.final)
        os.replace(self.partial, self.final)
        documents.sync(self.final.parent)


def _synced(path: Path) -> Content:
    documents.sync(path)
    return content_of(path)


class Checkpoint:
    """A checkpoint, verified when it is opened: the only way to read one. Damaged unless it is intact, of the run, and with these weights.

    config_sha256: of the run. weights_sha256: as the run's result.json has it. None for any.
    """

    def __init__(self, folder: Path, config_sha256: str | None = None, remedy: str = REMEDY, weights_sha256: str | None = None):
        self.folder, self.remedy = folder, remedy
        self.files = verify(folder, config_sha256, remedy)
        if weights_sha256 not in (None, self.weights_sha256):
            raise Damaged(folder / WEIGHTS, "holds other weights than those of the run's result.json", remedy)

    @property
    def step(self) -> int:
        return int(self.folder.name.rpartition("-")[2])

    @property
    def weights_sha256(self) -> str:
        return self.files[WEIGHTS]["sha256"]

    def json(self, name: str, schema: Any) -> dict[str, Any]:
        return documents.read(self.folder / name, schema, self.remedy, nullable=True)

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / name)

    def load_weights(self, model: nn.Module) -> nn.Module:
        return load_weights(model, self.folder)


def latest(root: Path, warn: Callable[[str], None], config_sha256: str | None = None) -> Checkpoint | None:
    """The newest intact checkpoint, after `warn(sentence)` for each newer damaged one. UserError if all are damaged."""
    fault = None
    for step in reversed(steps(root)):
        try:
            return Checkpoint(root / name_of(step), config_sha256)
        except Damaged as error:
            fault = f"{error.path} {error.fault}"
            warn(f"WARNING: {fault}; falling back to the previous checkpoint")
    if fault:
        remedy = "remove the folder, or choose another --work_dir, to start from step 0"
        raise UserError(f"no checkpoint in {root} is undamaged, at last {fault}: {remedy}")
    return None


def prune(root: Path, newest: int, keep: set[int]) -> None:
    """Removes the checkpoints up to the newest one but that, the one before it, and those of the steps to keep."""
    for step in [step for step in steps(root) if step <= newest][:-2]:
        if step not in keep:
            remove(root / name_of(step))


def remove(folder: Path) -> None:
    """Removes a checkpoint. It is renamed first, so that a kill leaves a leftover and never half a checkpoint."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed)


def require_space(root: Path, tensors: list[Tensor], copies: int, flag: str = "--work_dir") -> None:
    """Raises UserError unless the disk has room for `copies` copies of the tensors and 10 % more. Nothing is written."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    documents.require_space(existing, int(1.1 * copies * size), flag)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by "parameter index.name"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, values in state.items() for key, value in values.items() if isinstance(value, Tensor)}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rank_tensors(memory: tuple[Tensor, ...] | None, device: torch.device) -> dict[str, Tensor]:
    """The state of one process: the memory of its rows, and its random generators."""
    tensors = {f"memory.{index}": tensor for index, tensor in enumerate(memory or ())}
    tensors["rng.cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def load_rank(tensors: dict[str, Tensor], device: torch.device) -> tuple[Tensor, ...] | None:
    """Sets the random generators and returns the memory."""
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    count = sum(name.startswith("memory.") for name in tensors)
    return tuple(tensors[f"memory.{index}"].to(device) for index in range(count)) or None
