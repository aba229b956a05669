"""Errors shown to the user: one sentence with the value, the place and the remedy. The last net of every program."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from smoe_dropout.options import ConfigError

STOPS = (signal.SIGINT, signal.SIGTERM)
BROKEN_PIPE = 128 + 13  # what a shell reports of a program that SIGPIPE ended; Windows has no such signal
NAME = "checkpoints/.step-00000000.partial/optimizer.safetensors"  # about the longest that is written into a folder of a run
TRIAL = ".trial-of-writing"  # always the same, so that the next start removes it after a kill
LONGEST = 300  # characters of a path or of a parser's message that a refusal shows
DEEPEST = 200  # folders in a path
NO_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")  # how torch words it


class UserError(Exception):
    """A mistake in the input, not in the program. Only its text is shown, without a traceback."""

    code = 2


class TrainingError(Exception):
    """Training failed; the saved checkpoints are good. Only its text is shown."""

    code = 1


class Parser(argparse.ArgumentParser):
    """A parser whose refusals are UserErrors, one sentence without the usage."""

    def error(self, message: str) -> NoReturn:
        shown = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
        raise UserError(f"{shown} (nothing was started; --help lists all flags)")


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Ends the process with one sentence, and no traceback, for whatever in the block comes from outside the program.

    Exit codes: that of a `UserError` or `TrainingError`; 2 for a mistake of the library's, a file that cannot be used, and too little
    memory; 128 and the signal for Ctrl-C and SIGTERM; 141, silently, when nobody reads the output any more. Signals end the process
    between two such blocks as well, where a program imports torch. A program may handle signals itself within the block.
    """
    received: list[int] = []

    def stop(number: int, frame) -> None:
        received.append(number)
        raise KeyboardInterrupt

    _on_signals(stop)
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # there is none, or a test's
            stream.reconfigure(errors="backslashreplace")  # a name or title may have letters that the terminal lacks
    try:
        try:
            yield
        except SystemExit:
            print(end="", flush=True)
            raise
        print(end="", flush=True)  # what is printed is written now, when a closed pipe can still be told from an error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and not received:
            received.append(signal.SIGINT)
        if not received:  # C code that a signal interrupts may raise an error of its own
            _exit_with_sentence(error)
    finally:
        _on_signals(_end)
    if received:
        _say_stopped(received[0])
        _detach_output()
        sys.exit(128 + received[0])


def _exit_with_sentence(error: BaseException) -> None:
    """Prints the sentence for an error on stderr and exits with its code; raises it again if there is none."""
    if isinstance(error, BrokenPipeError):
        _detach_output()
        sys.exit(BROKEN_PIPE)
    if (said := sentence(error)) is None:
        raise error
    with suppress(OSError):
        print(f"error: {one_line(said)}", file=sys.stderr, flush=True)
    _detach_output()
    sys.exit(getattr(error, "code", 2))


def run_main(main: Callable[[], int | None]) -> None:
    """Calls `main` and ends the process with its return value."""
    with exit_on_user_error():
        sys.exit(main() or 0)


def refuse_unwritable(option: str, folder: str | os.PathLike) -> None:
    """Raises UserError if files cannot be written into a folder, which need not exist: tries it in what exists of it, leaving nothing."""
    try:
        existing = Path(folder)
        if len(existing.parts) > DEEPEST:
            raise UserError(f"{option} lies deeper than {DEEPEST} folders: choose another")
        with suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(existing / NAME)  # a path too long for the files in it
        while not existing.is_dir():
            if os.path.lexists(existing):
                link = " to nowhere" if existing.is_symlink() and not existing.exists() else ""
                raise UserError(f"{option} {folder} cannot be a folder, {existing} is a {'link' if link else 'file'}{link}: choose another")
            existing = existing.parent
        trial = existing / TRIAL
        try:
            trial.mkdir(exist_ok=True)
        finally:
            with suppress(FileNotFoundError):  # another process has removed it
                trial.rmdir()
    except OSError as error:
        raise UserError(f"{option} {one_line(str(folder))[:LONGEST]} cannot be written ({error.strerror}): choose another") from None


def sentence(error: BaseException) -> str | None:
    """The sentence for an error that is not the program's fault; None for any other error."""
    if isinstance(error, UserError | TrainingError | ConfigError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)):
        detail = f" ({str(error).strip().splitlines()[0]})" if str(error).strip() else ""
        return f"there is not enough memory{detail}: choose smaller sizes or batches, or a machine with more"
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        if error.filename is None:
            return f"a file or connection cannot be used ({reason}): fix that, then run the same command again"
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else error.filename
        return f"{path} cannot be used ({reason}): fix that, or give another"
    return None


def one_line(text: str) -> str:
    """The text with line ends, control characters and bytes that are not text written as escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _on_signals(handler: Callable) -> None:
    """Handles Ctrl-C and SIGTERM, unless they are ignored, as for a process in the background of a script."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                signal.signal(number, handler)


def _end(number: int, frame) -> None:
    """Ends the process at once, with the exit code that a shell gives for the signal."""
    _say_stopped(number)
    os._exit(128 + number)


def _say_stopped(number: int) -> None:
    with suppress(OSError):
        os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())


def _detach_output() -> None:
    """Sends output that cannot be written nowhere, so that the interpreter does not complain when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        except AttributeError:  # there is no such stream
            continue
