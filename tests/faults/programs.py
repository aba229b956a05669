"""Programs in processes of their own, forked from one that has imported torch, each with at most one fault.

The text of a program runs unchanged. `Fault` counts operations on files by Python's audit events (and wraps `os.fsync` and the call that
writes safetensors, which raise none), and acts before one of them.
"""

import atexit
import gc
import importlib
import io
import os
import re
import resource
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import NamedTuple

from tests.tiny import ROOT

HANG = 90.0  # seconds after which a program that has not ended hangs
# the place of the folder's descriptor in each event
OPERATIONS = {"os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.truncate": 2, "os.link": 2}
TRAINING = ("train", "torch.utils.tensorboard", "utils.training.setup", "accelerate.tracking")
PRELOADED = {  # modules that a program imports late, loaded once before it is forked
    "finetune.py": ("finetune",),
    "surgery.py": ("surgery", "smoe_dropout.surgery.clustering", "scipy.optimize"),
    "generate.py": ("generate",),
    "convert.py": ("convert",),
    "data/prepare_pieces.py": ("datasets", "transformers"),
    "utils.reporting": ("utils.reporting.ablations", "utils.reporting.surgery_table"),
    "tests.faults.library": ("transformers", "smoe_dropout.hf.pretrained"),
}


class Finished(NamedTuple):
    """How a program ended: its exit code (negative: a signal), None if it hung; its output; seconds of CPU and of wall time."""

    code: int | None
    out: str
    err: str
    cpu: float
    wall: float


class Fault(NamedTuple):
    """An act before the `at`-th operation on files below the working folder.

    act: "list" writes every operation into the file `to`; "kill"; "half", a kill during the writing before it, so that what was written
    last is cut in the middle; "fill", the disk of the file `to` is full but for `left` bytes; "size", no file grows beyond `left`; or the
    number of a signal.
    """

    act: str | int
    at: int = 0
    to: str = ""
    left: int = 0

    def install(self) -> None:
        here, count, busy, written = os.getcwd() + "/", 0, False, None

        def meet(event: str, path: object, inside: bool = False) -> None:
            nonlocal count, busy, written
            name = os.path.abspath(os.fsdecode(path))
            if busy or "/tensorboard/" in name or not (inside or name.startswith(here)):  # a thread writes there, at moments of its own
                return
            busy, count = True, count + 1
            half = written if written and os.path.exists(written[0]) and os.path.getsize(written[0]) > written[1] + 1 else None
            if self.act == "list":
                with open(self.to, "a") as file:
                    file.write(f"{event} {name.removeprefix(here)}{' half' if half else ''}\n")
            elif count == self.at:
                self._strike(half)
            written = (name, os.path.getsize(name) if os.path.exists(name) else 0) if event == "open" else None
            busy = False

        def audit(event: str, arguments: tuple) -> None:
            if event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
                meet(event, arguments[0])
            elif event in OPERATIONS:
                meet(event, arguments[0], inside=arguments[OPERATIONS[event] :][:1] not in ((), (-1,)))

        def counted(operation: Callable, event: str, path_of: Callable) -> Callable:
            return lambda *args, **kwargs: (meet(event, path_of(args)), operation(*args, **kwargs))[1]

        import safetensors.torch

        os.fsync = counted(os.fsync, "fsync", lambda args: os.readlink(f"/proc/self/fd/{args[0]}"))
        safetensors.torch.serialize_file = counted(safetensors.torch.serialize_file, "open", lambda args: args[1])
        sys.addaudithook(audit)

    def _strike(self, half: tuple[str, int] | None) -> None:
        if self.act == "half" and half:
            os.truncate(half[0], (os.path.getsize(half[0]) + half[1]) // 2)
        if self.act == "fill":
            fill(Path(self.to), self.left)
        elif self.act == "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.left, self.left))
        else:
            os.kill(os.getpid(), self.act if isinstance(self.act, int) else signal.SIGKILL)


def fill(path: Path, left: int) -> None:
    """Fills the disk of a file with zeros but for `left` bytes."""
    with open(path, "ab", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
        file.truncate(max(0, file.tell() - left))


def run(
    command: list[str],
    folder: Path,
    fault: Fault | None = None,
    lines: int | None = None,
    after: tuple[int, float] | None = None,
    log: Path | None = None,
) -> Finished:
    """Runs a program in a folder. lines: its stdout is closed after so many lines. after: a signal's number, and the second it comes at.

    log: a path for its output, if that is not to stand beside the folder.
    """
    for name in (*TRAINING, *PRELOADED.get(command[command[0] == "-m"], ())):
        importlib.import_module(name)
    logs = [Path(f"{log or folder}.{name}") for name in ("out", "err")]
    out, err = (os.open(path, os.O_CREAT | os.O_RDWR | os.O_TRUNC) for path in logs)
    reader, writer = os.pipe() if lines is not None else (None, out)
    begin = time.monotonic()
    if not (pid := os.fork()):
        if reader is not None:
            os.close(reader)
        _become(command, folder, writer, err, fault)
    if reader is not None:
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            any(not pipe.readline() for _ in range(lines))
    code, usage = _wait(pid, begin, after)
    os.close(out), os.close(err)
    texts = (path.read_bytes().decode(errors="backslashreplace") for path in logs)
    return Finished(code, *texts, usage.ru_utime + usage.ru_stime, time.monotonic() - begin)


def run_plainly(command: list[str], folder: Path, interrupt: Callable[[subprocess.Popen], None] = lambda process: None) -> Finished:
    """Runs a program as a process of its own from the start of Python; `interrupt` gets the process."""
    words = command if command[0] == "-m" else [str(ROOT / command[0]), *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    begin, pipe = time.monotonic(), subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe
    ) as process:
        interrupt(process)
        try:
            out, err = process.communicate(timeout=HANG)
        except subprocess.TimeoutExpired:
            process.kill()
            return Finished(None, "", process.communicate()[1].decode(errors="backslashreplace"), 0.0, HANG)
    texts = ((text or b"").decode(errors="backslashreplace") for text in (out, err))
    return Finished(process.returncode, *texts, 0.0, time.monotonic() - begin)


def handles_signals(pid: int) -> bool:
    """Return whether a process has begun with its own text: the first thing a program does is to handle SIGTERM."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return caught is not None and bool(int(caught.group(1), 16) >> (signal.SIGTERM - 1) & 1)


def _wait(pid: int, begin: float, after: tuple[int, float] | None):
    """The exit code, None after HANG seconds, and the resources used."""
    ended = select.poll()
    ended.register(descriptor := os.pidfd_open(pid), select.POLLIN)
    if after is not None:
        while not handles_signals(pid) and not ended.poll(1):
            pass
        if not ended.poll(1000 * after[1]):
            os.kill(pid, after[0])
    if hung := not ended.poll(1000 * max(0.0, HANG - (time.monotonic() - begin))):
        os.killpg(pid, signal.SIGKILL)
    os.close(descriptor)
    _, status, usage = os.wait4(pid, 0)
    return None if hung else os.waitstatus_to_exitcode(status), usage


def _become(command: list[str], folder: Path, out: int, err: int, fault: Fault | None) -> None:
    """Becomes the program in a forked process, and ends as the interpreter would. Does not return."""
    code = 0
    try:
        os.setsid()
        os.chdir(folder)
        for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), out, err)):
            os.dup2(descriptor, number)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8")
        sys.stderr = io.TextIOWrapper(io.BufferedWriter(io.FileIO(2, "w", closefd=False)), "utf-8", "backslashreplace", line_buffering=True)
        atexit._clear()
        util._finalizer_registry.clear()
        gc.freeze()  # the search for garbage at the end passes over what was imported before
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = command[1:] if command[0] == "-m" else [str(ROOT / command[0]), *command[1:]]
        if fault is not None:
            fault.install()
        if command[0] == "-m":
            for name in (f"{command[1]}.__main__", *([] if hasattr(sys.modules.get(command[1]), "__path__") else [command[1]])):
                sys.modules.pop(name, None)
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        print(ended.code if code and not isinstance(ended.code, int) else "", end="", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        util._run_finalizers()
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        code = 120
    os._exit(code)
