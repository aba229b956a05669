"""The command line of convert.py. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from utils import documents
from utils.cli.pipeline import Program, decide
from utils.errors import UserError, refuse_unwritable
from utils.flags.fields import ConvertFlags

ACCOUNT = "conversion.json"  # what was done
USUAL = {"expert_init": "split", "cut": "coactivation", "gate_weight": "unit", "correction": "norm"}  # where an account has no value
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Origin(NamedTuple):
    """A model to convert. place: its folder, or id on the hub. gguf: name of the GGUF file in the folder; None for transformers' own."""

    place: str
    gguf: str | None = None

    @property
    def weights(self) -> list[Path]:
        """The files that hold the weights; none of a model on the hub."""
        folder = Path(self.place)
        return [folder / self.gguf] if self.gguf else sorted(folder.glob("*.safetensors")) if folder.is_dir() else []


def parse(argv: Sequence[str] | None = None) -> tuple[ConvertFlags, Origin]:
    """The flags of a command line, and the model. Raises UserError listing all mistakes."""
    flags, origin = decide(PROGRAM, argv)
    refuse_unwritable("--out", flags.out)
    return flags, origin


def opened(path: Path) -> Origin:
    """The model at a path, or of that id on the hub. Raises UserError for anything else."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"--from {path} is a file, but not a GGUF file: give that, or the folder of a transformers model")
        return Origin(str(path.parent), path.name)
    if not path.is_dir():
        if path.is_absolute() or not HUB_ID.fullmatch(str(path)):
            raise UserError(f"--from {path} does not exist: give the folder of a transformers model, a GGUF file, or a hub id")
        return Origin(str(path))
    files = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file() or len(files) != 1:
        if not (path / "config.json").is_file():
            raise UserError(
                f"--from {path} has no config.json and {len(files)} GGUF files: give the folder of a transformers model, or a file"
            )
        return Origin(str(path))
    return Origin(str(path), files[0].name)


def is_finished(flags: ConvertFlags) -> bool:
    """Return whether --out holds a conversion by these flags, of whatever text."""
    if not (path := Path(flags.out, ACCOUNT)).is_file():
        return False
    made = documents.read(path, dict, "remove the folder and convert again").get("flags", {})
    here = {name: value for name, value in asdict(flags).items() if name not in ("out", "data", "device", "threads")}
    return all((made.get(name) or USUAL.get(name)) == (value or USUAL.get(name)) for name, value in here.items())


def _mistakes(flags: ConvertFlags, origin: Origin | None) -> list[str]:
    found, out = [], Path(flags.out)
    if not Path(flags.data).is_file():
        found.append(f"--data {flags.data} is not a file: give a text, such as one line for each paragraph")
    if out.is_dir() and any(out.iterdir()) and not is_finished(flags):
        found.append(f"--out {out} holds something already: choose an empty or a new folder")
    if flags.shared_experts >= flags.num_experts:
        found.append(f"--shared_experts {flags.shared_experts} must be less than --num_experts {flags.num_experts}")
    if flags.correction == "mean" and not flags.shared_experts:
        found.append("--correction mean is added by a shared expert: give --shared_experts")
    copies = flags.expert_init == "copy"
    if copies and (name := "cut" if flags.cut else "gate_weight" if flags.gate_weight == "unit" else None):
        found.append(f"--{name} {getattr(flags, name)} is for experts that are cut, which --expert_init copy does not make: leave it out")
    if (copies or flags.gate_weight == "softmax") and flags.correction not in (None, "none"):
        found.append(f"--correction {flags.correction} is of a sum of experts, which softmax does not weigh: leave it out")
    if flags.k is not None and flags.k > flags.num_experts:
        found.append(f"--k {flags.k} must be at most --num_experts {flags.num_experts}")
    return found


PROGRAM = Program("convert.py", ConvertFlags, "from", open=opened, mistakes=_mistakes)
