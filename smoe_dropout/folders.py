"""Folders that one process uses at a time, locked meanwhile, so that another can tell them from what a killed process left."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(folder: Path) -> Iterator[bool | None]:
    """Lock a folder during the block. Yields False if another process holds or has removed it, None where the system has no such locks."""
    descriptor, free = _lock(folder)
    try:
        yield free
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> tuple[int | None, bool | None]:
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)
        return descriptor, True
    except (BlockingIOError, FileNotFoundError):
        return descriptor, False
    except (ImportError, OSError):  # Windows has no such locks, nor have some network file systems
        return descriptor, None


@contextmanager
def temporary(parent: Path, prefix: str, suffix: str = "") -> Iterator[Path]:
    """A new folder, held during the block and then removed if it is still there."""
    while True:
        folder = parent / f"{prefix}{uuid.uuid4().hex[:8]}{suffix}"
        try:
            folder.mkdir()
            with held(folder) as free:
                if free is False:  # another process has taken it for one left behind, before it was held
                    continue
                yield folder
                return
        finally:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder if it is there, even if Ctrl-C comes in the middle."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
