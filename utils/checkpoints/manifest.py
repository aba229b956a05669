"""The checkpoints of a run, and their verification. Imports no torch.

    checkpoints/step-00001000/  model.safetensors  optimizer.safetensors  rank0.safetensors ...  state.json  manifest.json

manifest.json, written last, holds size and sha256 of every file. state.json holds the step, and the config_sha256 of the run.
"""

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec import UNSET, Struct, UnsetType

from utils import documents
from utils.documents import Content, Count, Damaged, Sha256, content_of

MANIFEST, STATE, WEIGHTS = "manifest.json", "state.json", "model.safetensors"
REMEDY = "restore it from a copy, or give another checkpoint"


class Stored(Struct):
    """The part of a state.json that identifies the checkpoint, and metrics.jsonl at that step. Older ones have `best_step` only."""

    best_step: Count
    step: Count | UnsetType = UNSET
    config_sha256: Sha256 | UnsetType = UNSET
    metrics: Content | UnsetType = UNSET


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def steps(root: Path) -> list[int]:
    """The steps with a checkpoint, intact or damaged, ascending."""
    found = [re.fullmatch(r"step-(\d{8,})", entry.name) for entry in root.glob("step-*")] if root.exists() else []
    return sorted(int(match.group(1)) for match in found if match)


def verify(folder: Path, config_sha256: str | None = None, remedy: str = REMEDY) -> dict[str, Content]:
    """The manifest. Damaged, naming the first file that is missing, foreign, or contradicts it, or is of another step or run.

    config_sha256: of the run that the checkpoint should belong to, None for any.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise Damaged(path, f"is missing, so {folder} is not a complete checkpoint", remedy)
    manifest: dict[str, Content] = documents.read(path, dict[str, Content], remedy)
    here = {entry.name for entry in folder.iterdir()} - {MANIFEST}
    if missing := sorted({*manifest, STATE} - here):
        raise Damaged(folder / missing[0], "is missing from the checkpoint", remedy)
    if foreign := sorted(here - manifest.keys()):
        raise Damaged(folder / foreign[0], f"is not part of the checkpoint, {MANIFEST} does not list it", remedy)
    with ThreadPoolExecutor() as pool:
        for name, found in zip(manifest, pool.map(_content_or_none, (folder / name for name in manifest)), strict=True):
            if found != manifest[name]:
                raise Damaged(folder / name, f"is damaged: its size or sha256 differs from {MANIFEST}", remedy)
    state = documents.read(folder / STATE, Stored, remedy, nullable=True)
    if folder.name.startswith("step-") and state.get("step", 0) and folder.name != name_of(state["step"]):
        raise Damaged(folder, f"is damaged: it holds the checkpoint of step {state['step']}", remedy)
    if config_sha256 is not None and state.get("config_sha256", config_sha256) != config_sha256:
        raise Damaged(folder, "belongs to another run than its config.json", remedy)
    return manifest


def _content_or_none(path: Path) -> Content | None:
    return content_of(path) if path.is_file() else None


def clean(root: Path) -> None:
    """Removes what killed processes left of checkpoints that were being written or removed."""
    for leftover in [*root.glob(".step-*.partial"), *root.glob(".step-*.removed")]:
        shutil.rmtree(leftover)
