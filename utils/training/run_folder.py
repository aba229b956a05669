"""The folder of one run, `--work_dir` exactly: its flags, environment, measurements, checkpoints and record.

config.json  env.json  metrics.jsonl  tensorboard/  checkpoints/  result.json
"""

import dataclasses
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from utils.documents import sync
from utils.errors import UserError
from utils.flags.derive import read_config
from utils.flags.fields import Flags, names


def write_json(path: Path, value: Any) -> None:
    """Writes a file atomically: it has the old content or the new, never a part."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    sync(partial)
    os.replace(partial, path)


class RunFolder:
    """Opened by the main process only, which keeps it locked until it ends.

    Raises UserError when another process has locked it, or when it holds a run of another configuration (the difference is named) or
    other files.
    """

    def __init__(self, flags: Flags, fingerprints: dict[str, str]):
        self.path = Path(flags.work_dir)
        config = {name: value for name, value in dataclasses.asdict(flags).items() if name not in names(role="unstored")}
        config |= fingerprints
        self._refuse_foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
        except PermissionError as error:
            raise UserError(f"--work_dir {self.path} cannot be written ({error.strerror}): choose another") from None
        self._match_config(config)
        self._writer, self.metrics_path = None, self.path / "metrics.jsonl"

    @staticmethod
    def checkpoints_of(flags: Flags) -> Path:
        """The folder of a run's checkpoints; every process may read them."""
        return Path(flags.work_dir) / "checkpoints"

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--work_dir {self.path} is a file: choose another")
        found = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        if "config.json" not in found and found - {".lock", "config.partial"}:
            raise UserError(f"--work_dir {self.path} holds other files and no run: choose an empty or a new folder")

    def _lock(self) -> None:
        self._lock_file = open(self.path / ".lock", "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--work_dir {self.path} is in use by another run: wait for it, or choose another folder") from None

    def _match_config(self, config: dict[str, Any]) -> None:
        path = self.path / "config.json"
        if not path.exists():
            write_json(path, config)
            return
        stored = read_config(self.path)
        if absent := sorted(config.keys() - stored.keys()):
            raise UserError(f"--work_dir {self.path} holds a run of another version, without {', '.join(absent)}: choose another folder")
        differences = [
            f"{name} was {stored.get(name)!r} and is now {config.get(name)!r}"
            for name in sorted(stored.keys() | config.keys())
            if name not in names(role="replaceable") and stored.get(name) != config.get(name)
        ]
        if differences:
            raise UserError(f"--work_dir {self.path} holds another run: {', '.join(differences)}; choose another folder, or the same flags")

    def write_environment(self, engine, argv: list[str]) -> None:
        """Appends this start to env.json."""
        path, started = self.path / "env.json", datetime.now(timezone.utc).isoformat(timespec="seconds")
        starts = json.loads(path.read_text()) if path.exists() else []
        write_json(path, [*starts, {"started": started, "argv": argv, **describe_environment(engine)}])

    def truncate_metrics(self, step: int) -> None:
        """Drops the lines after the checkpoint of this step, which will be recorded again."""
        kept = [line for line in self.metrics() if line["step"] <= step]
        partial = self.metrics_path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(partial, self.metrics_path)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order; a last line cut by a kill is dropped."""
        if not self.metrics_path.exists():
            return []
        lines = []
        for text in self.metrics_path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines

    def record(self, line: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl, and its numbers to TensorBoard as scalars."""
        with open(self.metrics_path, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self.tensorboard(line["step"]).add_scalar(f"{line['split']}/{name}", value, line["step"])

    def record_histogram(self, name: str, shares: torch.Tensor, step: int) -> None:
        """Records expert load as a histogram whose bins are the experts."""
        shares = shares.double().cpu()
        edges = torch.arange(len(shares) + 1, dtype=torch.float64)
        centres = edges[:-1] + 0.5
        self.tensorboard(step).add_histogram_raw(
            name,
            min=0.0,
            max=float(len(shares)),
            num=1.0,
            sum=float((centres * shares).sum()),
            sum_squares=float((centres**2 * shares).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=shares.tolist(),
            global_step=step,
        )

    def tensorboard(self, step: int):
        """The event writer, opened on first use; events of later steps, from before a resume, are purged."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def describe_environment(engine) -> dict[str, Any]:
    """Commit, versions and hardware."""
    packages = ("torch", "accelerate", "safetensors", "numpy", *(["transformers"] if "transformers" in sys.modules else []))
    return {
        "commit": _git_commit(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "device": engine.device.type,
        "device_name": engine.device_name,
        "threads": torch.get_num_threads(),
        "tuned": engine.tuned,
        "cores": os.cpu_count(),
        "precision": engine.accelerator.mixed_precision.replace("no", "fp32"),
        "world_size": engine.world_size,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _git_commit() -> str | None:
    """The commit of the code, with "+changes" if tracked files other than records and figures differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results", ":(top,exclude)Figs")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def resume_command(world_size: int) -> str:
    """The command that resumes this run."""
    start = ["python"] if world_size == 1 else ["torchrun", "--nproc_per_node", str(world_size)]
    return shlex.join([*start, *sys.argv])
