"""The folder of one run, `--work_dir` exactly: its flags, environment, measurements, checkpoints and record.

config.json  env.json  metrics.jsonl  tensorboard/  checkpoints/  result.json
"""

import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from utils import documents
from utils.checkpoints.manifest import STATE, Stored, clean, name_of, steps, verify
from utils.checkpoints.run_files import (
    BEGUN,
    CONFIG,
    LOCK,
    Line,
    config_of,
    config_sha256,
    read_config,
    read_starts,
    recorded_metrics,
    remedy_for,
)
from utils.documents import Content, Damaged, note_unverified
from utils.errors import TrainingError, UserError
from utils.flags.fields import Flags, names

SHOWN = 40  # longest value quoted in a refusal, in characters
LEFT = ("config", "env", "metrics", "result", "eval", "surgery")  # version 0.1 wrote NAME.partial before renaming it


class RunFolder:
    """Opened by the main process only, which keeps it locked until it ends.

    Raises UserError when another process has locked it, or when it holds a run of another configuration (the difference is named) or
    other files, or cannot be written; nothing is left behind then. option: the flag that names the folder. lost: what --repair had to give
    up.
    """

    def __init__(self, flags: Flags, fingerprints: dict[str, str], option: str = "--work_dir"):
        self.path, self.repairs, self.lost = Path(flags.work_dir), flags.repair, []
        self._named = f"{option} {self.path}"
        self._writer, self.metrics_path = None, self.path / "metrics.jsonl"
        self._made: list[Path] = []  # by this process, to be removed if the run cannot begin
        try:
            self._refuse_foreign()
            self._make_and_lock()
            self.config_sha256 = config_sha256(self._matched(config_of(flags, fingerprints)))
        except OSError as error:
            self._unmake()
            raise UserError(f"{self._named} cannot be written ({error.strerror}): fix that, or choose another") from None
        clean(self.path / "checkpoints")
        for leftover in [*self.path.glob(".*.partial"), *(self.path / f"{name}.partial" for name in LEFT)]:
            leftover.unlink(missing_ok=True)

    @staticmethod
    def checkpoints_of(flags: Flags) -> Path:
        """The folder of a run's checkpoints; every process may read them."""
        return Path(flags.work_dir) / "checkpoints"

    def _refuse_foreign(self) -> None:
        found = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        if CONFIG in found or not found - BEGUN:
            return
        if not steps(self.path / "checkpoints"):
            raise UserError(f"{self._named} holds other files and no run: choose an empty or a new folder")
        if not self.repairs:
            raise Damaged(self.path / CONFIG, "is missing", remedy_for(self.path))

    def _make_and_lock(self) -> None:
        lock = self.path / LOCK
        self._made = [path for path in (lock, self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_file = open(lock, "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self._named} is in use by another run: wait for it, or choose another folder") from None

    def _unmake(self) -> None:
        for path in self._made:
            with suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)

    def _matched(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration, without what an older version did not store in the folder."""
        path, older = self.path / CONFIG, {name: value for name, value in config.items() if name != "tokens_sha256"}
        if not path.exists() and not steps(self.path / "checkpoints"):
            documents.write(path, config)
            self._made = [path, *self._made]
            return config
        try:
            stored = read_config(self.path)
        except UserError:
            whole = [one for one in (config, older) if self.repairs and self._is_of(config_sha256(one))]
            if not whole:
                raise
            documents.write(path, stored := whole[0])
        config = config if "tokens_sha256" in stored else older
        different = [name for name in sorted({*stored, *config} - {*names(role="replaceable")}) if stored.get(name) != config.get(name)]
        if different:
            changes = [f"{name} was {_short(stored.get(name))} and is now {_short(config.get(name))}" for name in different]
            raise UserError(
                f"{self._named} holds another run, of other {', '.join(different)}: {', '.join(changes)}; "
                "choose another folder, or the same flags and files"
            )
        return config

    def _is_of(self, identity: str) -> bool:
        """Return whether an intact checkpoint has this identity."""
        for step in steps(root := self.path / "checkpoints"):
            with suppress(Damaged):
                verify(folder := root / name_of(step))
                if documents.read(folder / STATE, Stored, remedy_for(self.path), nullable=True).get("config_sha256") == identity:
                    return True
        return False

    def write_environment(self, engine, argv: list[str], resumes: bool) -> None:
        """Appends this start to env.json, which a run that is resumed must have."""
        path, started = self.path / "env.json", datetime.now(timezone.utc).isoformat(timespec="seconds")
        try:
            starts = read_starts(self.path, self.config_sha256) if resumes or path.exists() else []
        except Damaged:
            if not self.repairs:
                raise
            starts = []
            self.lost.append("env.json of earlier starts")
        starts.append({"started": started, "argv": argv, **describe_environment(engine)})
        try:
            documents.write(path, {"config_sha256": self.config_sha256, "starts": starts})
        except OSError as error:
            self._unmake()
            raise UserError(f"{path} cannot be written ({error.strerror}): fix that, and run the same command again") from None

    def resume_metrics(self, step: int, known: Content | None) -> None:
        """Cuts metrics.jsonl back to what it was at a checkpoint of this step. Damaged if that is not there any more.

        known: the size and hash of the file then; None for a checkpoint of version 0.1, which did not store them.
        """
        path, recorded = self.metrics_path, b""
        try:
            recorded = recorded_metrics(self.path, step, known)
            if known is None:
                note_unverified(path)
        except Damaged:
            if not self.repairs:
                raise
            self.lost.append(f"metrics.jsonl up to step {step}")
        self._metrics = open(path, "ab")  # noqa: SIM115 (held until the process ends)
        os.truncate(path, len(recorded))
        self._digest, self._size = hashlib.sha256(recorded), len(recorded)

    def synced_metrics(self) -> Content:
        """Size and hash of metrics.jsonl, which is on the disk now."""
        os.fsync(self._metrics.fileno())
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order. Damaged if they are not the recorded ones."""
        path, remedy = self.metrics_path, remedy_for(self.path)
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).digest() != self._digest.digest():
            raise Damaged(path, "was changed while the run was in progress", remedy)
        return documents.lines(content, Line, path, remedy)

    def record(self, line: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl, and its numbers to TensorBoard as scalars."""
        text = (json.dumps(line) + "\n").encode()
        with _writing(self.metrics_path):
            self._metrics.write(text)
            self._metrics.flush()
        self._digest.update(text)
        self._size += len(text)
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                with _writing(self.path / "tensorboard"):
                    self.tensorboard(line["step"]).add_scalar(f"{line['split']}/{name}", value, line["step"])

    def record_histogram(self, name: str, shares: torch.Tensor, step: int) -> None:
        """Records expert load as a histogram whose bins are the experts."""
        shares = shares.double().cpu()
        edges = torch.arange(len(shares) + 1, dtype=torch.float64)
        centres = edges[:-1] + 0.5
        sums = {"sum": float((centres * shares).sum()), "sum_squares": float((centres**2 * shares).sum())}
        bins = {"bucket_limits": edges[1:].tolist(), "bucket_counts": shares.tolist()}
        with _writing(self.path / "tensorboard"):
            self.tensorboard(step).add_histogram_raw(name, min=0.0, max=float(len(shares)), num=1.0, **sums, **bins, global_step=step)

    def tensorboard(self, step: int):
        """The event writer, opened on first use; events of later steps, from before a resume, are purged."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = _raised_again
            self._writer = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)
        return self._writer

    def close(self) -> None:
        if self._writer is not None:
            with _writing(self.path / "tensorboard"):
                self._writer.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Names a file of the run that cannot be written."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path} cannot be written ({error.strerror}): fix that, and rerun the same command to resume") from None


def _raised_again(failure: threading.ExceptHookArgs) -> None:
    """Ignores a full disk in TensorBoard's thread, which raises the error again at the next event."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def describe_environment(engine) -> dict[str, Any]:
    """Commit, versions and hardware."""
    packages = ("torch", "accelerate", "safetensors", "numpy", *(["transformers"] if "transformers" in sys.modules else []))
    return {
        "commit": git_commit(),
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


def git_commit() -> str | None:
    """The commit of the code, with "+changes" if tracked files other than records and figures differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results", ":(top,exclude)Figs")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def resume_command(world_size: int) -> str:
    """The command that resumes this run."""
    start = ["python"] if world_size == 1 else ["torchrun", "--nproc_per_node", str(world_size)]
    return shlex.join([*start, *sys.argv])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
