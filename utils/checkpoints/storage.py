"""Atomic checkpoints: a folder of safetensors, written under another name, synced, then renamed.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  rank0.safetensors ...  state.json  manifest.json

manifest.json, written last, holds size and sha256 of every file; a folder without it, or with other files, is not a checkpoint.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils import documents
from utils.data import writing
from utils.data.corpus import digest_of, read_chunks
from utils.errors import UserError

MANIFEST = "manifest.json"


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps with a finished checkpoint, ascending."""
    found = [re.fullmatch(r"step-(\d+)", entry.name) for entry in root.glob("step-*")] if root.exists() else []
    return sorted(int(match.group(1)) for match in found if match and (root / match.group(0) / MANIFEST).exists())


class Writer:
    """Writes a checkpoint. Every process may `add` files; the main process calls `finish` when all have."""

    def __init__(self, root: Path, step: int, is_main: bool):
        self.final, self.partial = root / name_of(step), root / f".{name_of(step)}.partial"
        if is_main:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)

    def add(self, name: str, tensors: dict[str, Tensor]) -> None:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, self.partial / name)

    def add_json(self, name: str, value: Any) -> None:
        (self.partial / name).write_text(json.dumps(value, indent=1))

    def finish(self) -> None:
        files = sorted(self.partial.iterdir())
        manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
        (self.partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*files, self.partial / MANIFEST, self.partial]:
            documents.sync(path)
        shutil.rmtree(self.final, ignore_errors=True)  # a damaged checkpoint of the same step
        os.replace(self.partial, self.final)
        documents.sync(self.final.parent)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def verify(folder: Path) -> None:
    """Raises UserError naming the first file that is missing or contradicts the manifest."""
    try:
        manifest = read_json(folder / MANIFEST)
        expectations = {name: (expected["bytes"], expected["sha256"]) for name, expected in manifest.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        expectations = {}
    if "state.json" not in expectations:
        raise UserError(f"{folder / MANIFEST} is missing or damaged, so {folder} is not a complete checkpoint")
    for name, (size, digest) in expectations.items():
        path = folder / name
        if not path.exists():
            raise UserError(f"{path} is missing from the checkpoint")
        if path.stat().st_size != size or _sha256(path) != digest:
            raise UserError(f"{path} is damaged: its size or sha256 differs from {MANIFEST}")


def latest(root: Path, warn) -> Path | None:
    """The newest undamaged checkpoint, after `warn(sentence)` for each newer damaged one. UserError if all are damaged."""
    candidates = [root / name_of(step) for step in reversed(steps(root))]
    for folder in candidates:
        try:
            verify(folder)
            return folder
        except UserError as error:
            warn(f"WARNING: {error}; falling back to the previous checkpoint")
    if candidates:
        raise UserError(f"no checkpoint in {root} is undamaged; remove the folder, or choose another --work_dir, to start from step 0")
    return None


def prune(root: Path, keep: set[int]) -> None:
    """Removes all checkpoints but the last two and those of the steps to keep, and the remains of unfinished ones."""
    for step in steps(root)[:-2]:
        if step not in keep:
            (root / name_of(step) / MANIFEST).unlink()  # first, so that a kill never leaves half a checkpoint
            shutil.rmtree(root / name_of(step))
    unfinished = [folder for folder in root.glob("step-*") if not (folder / MANIFEST).exists()]  # an interrupted removal
    for leftover in [*root.glob(".step-*.partial"), *unfinished]:
        shutil.rmtree(leftover)


def require_space(root: Path, tensors: list[Tensor], copies: int) -> None:
    """Raises UserError unless the disk has room for `copies` copies of the tensors and 10 % more."""
    root.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    writing.require_space(root, int(1.1 * copies * size), "--work_dir")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by "parameter index.name"."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, values in state.items() for key, value in values.items() if isinstance(value, Tensor)}


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
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


def load_rank(path: Path, device: torch.device) -> tuple[Tensor, ...] | None:
    """Sets the random generators and returns the memory. UserError if the run had fewer processes."""
    if not path.exists():
        raise UserError(f"{path} is missing: the run had fewer processes; resume it with the same number")
    tensors = load_file(path)
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
    count = sum(name.startswith("memory.") for name in tensors)
    return tuple(tensors[f"memory.{index}"].to(device) for index in range(count)) or None


def _sha256(path: Path) -> str:
    return digest_of(read_chunks(path), "sha256")[1]
