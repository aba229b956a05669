"""Write the folder of a dataset: built under another name, installed by renaming, and kept if it is already prepared."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from utils.data.corpus import CHUNK, META, SCHEMA, SPLITS, UNITS, Corpus, digest_of, read_chunks, split_file
from utils.data.download import log
from utils.errors import UserError, run_main

SPACE_MARGIN = 16 << 20  # bytes of disk left free
MOVE = "choose another --out, or move it"
REPLACE = "choose another --out, or replace it with --force"


def require_space(folder: Path, size: int, flag: str = "--out") -> None:
    """Raise UserError unless the disk of `folder` has room for `size` bytes; the remedy is another folder by `flag`."""
    free, needed = shutil.disk_usage(folder).free, size + SPACE_MARGIN
    if free < needed:
        raise UserError(f"{folder} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed: make room, or choose another {flag}")


@contextmanager
def refuse_unreadable(source: str, remedy: str) -> Iterator[None]:
    """Raise UserError for whatever goes wrong while `source` is read."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # many kinds: of the network, the hub, a decompressor or a parser
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{source} cannot be read ({reason}): {remedy}") from error


def write_synced(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file whose content survives a power failure after the call."""
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file, or the renames within a folder, to disk, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def install(built: Path, out: Path) -> None:
    """Move the finished folder to `out`. A reader of `out` finds the old files, none, or the new ones, never a mixture.

    Entries of a prepared text are replaced one by one, so that other files in its folder stay: meta.json, without which the text is
    refused, is removed first and written last. Any other folder is replaced entirely.
    """
    if not out.exists():
        os.rename(built, out)
        sync(out.parent)
    elif (built / META).exists():
        (out / META).unlink(missing_ok=True)
        sync(out)
        for path in sorted(built.iterdir(), key=lambda path: path.name == META):
            if path.is_dir():
                shutil.rmtree(out / path.name, ignore_errors=True)
            os.replace(path, out / path.name)
        sync(out)
    elif Path.cwd().is_relative_to(out):
        raise UserError(f"{out} is the working folder, which cannot be replaced: start the program from another")
    else:
        old = built.with_suffix(".old")
        try:
            os.rename(out, old)
            os.rename(built, out)
            sync(out.parent)
        finally:
            if old.exists() and not out.exists():
                os.rename(old, out)
            shutil.rmtree(old, ignore_errors=True)


def display_path(path: Path) -> Path:
    """Return `path` relative to the working folder if it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def describe_files(paths: list[Path]) -> str:
    """Return the names and sizes of files, as meta.json records them under "source"."""
    return " + ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in paths)


class Dataset(ABC):
    """A folder to prepare, as the command line describes it."""

    inputs: frozenset[str] = frozenset()  # files in the folder that the dataset is made from

    def __init__(self, args: argparse.Namespace, data_dir: Path) -> None:
        """`args`: name, out, force and what the program adds. `data_dir`: where the folder is unless --out says otherwise."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", args.name):
            raise UserError(f"the name {args.name!r} cannot be that of a folder: use letters, digits, '.', '_' and '-'")
        self.args, self.name = args, args.name
        self.out: Path = args.out or display_path(data_dir / args.name)

    @abstractmethod
    def owns(self, name: str) -> bool:
        """Whether the file `name`, relative to the folder, belongs to it: `--force` never touches a folder with other files."""

    @abstractmethod
    def check(self, found: list[str]) -> None:
        """Raise UserError unless the files `found` in the folder are the dataset asked for."""

    @abstractmethod
    def build(self, folder: Path) -> list[str]:
        """Write everything into the empty `folder` and return the lines to report. Raises UserError for unusable input."""

    def is_ready(self) -> bool:
        """Whether the dataset is already prepared. Raises UserError if its folder holds something else."""
        if not self.out.exists():
            return False
        if not self.out.is_dir():
            raise UserError(f"{self.out} is a file, not a folder: {MOVE}")
        found = []
        for path in self.out.rglob("*"):
            if path.is_symlink() or not path.is_dir():
                name = path.relative_to(self.out).as_posix()
                if name not in self.inputs and not self.owns(name):
                    raise UserError(f"{self.out} holds {name}, which is not part of {self.name}: {MOVE}")
                found += [name] if name not in self.inputs else []
        if self.args.force or not found:
            return False
        self.check(sorted(found))
        return True

    def prepare(self) -> Path:
        """Build and install the dataset unless it is already prepared; return its folder. A failure leaves nothing behind."""
        try:
            log("\n".join([f"already prepared: {self.out}"] if self.is_ready() else self._install()))
        except OSError as error:
            raise UserError(f"{error.filename or self.out}: {error.strerror or error}") from None
        return self.out

    def _install(self) -> list[str]:
        out = self.out.resolve()  # behind a link, so that the folder is built on the same disk
        created = [folder for folder in out.parents if not folder.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        building = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
        building.mkdir()
        try:
            lines = self.build(building)
            install(building, out)
            return lines
        except OSError:
            if not self.is_ready():  # else another process has installed the same in the meantime
                raise
            return [f"already prepared: {self.out}"]
        finally:
            shutil.rmtree(building, ignore_errors=True)
            with suppress(OSError):  # a folder that is not empty stays
                for folder in created:
                    folder.rmdir()


class TextDataset(Dataset):
    """A text as `utils.data.corpus` reads it: three splits and meta.json."""

    unit: str  # one of UNITS

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the entries of meta.json by which a prepared folder is recognised."""

    def owns(self, name: str) -> bool:
        """Other files may be kept beside a prepared text, but not in a folder without meta.json."""
        known = {META, "tokenizer", *(split_file(self.out, split).name for split in SPLITS)}
        return name.partition("/")[0] in known or (self.out / META).exists()

    def check(self, found: list[str]) -> None:
        if not (self.out / META).exists():
            raise UserError(f"{self.out} holds {found[0]} but no {META}: {REPLACE}")
        corpus = Corpus.open(self.out)
        found_meta = corpus.meta | {"unit": corpus.unit, "tokenizer": corpus.vocabulary and corpus.vocabulary.name}
        title = {"title": self.args.title} if self.args.title else {}
        for key, value in ({"name": self.name, "unit": self.unit} | self.settings() | title).items():
            if found_meta.get(key) != value:
                raise UserError(f"{self.out} has {key} {found_meta.get(key)!r}, not {value!r}: {REPLACE}")

    def split(self, whole: Path, held_out: int, edit: Callable[[bytes], bytes] = bytes) -> dict[str, dict[str, Any]]:
        """Replace the file `whole` by train, valid and test, in the order of the text, and return their entries for meta.json.

        `held_out` symbols are for valid and as many for test; `edit` is applied to each chunk that is written.
        """
        dtype = UNITS[self.unit].dtype
        require_space(whole.parent, whole.stat().st_size)
        symbols, step, entries = np.memmap(whole, dtype, mode="r"), CHUNK // dtype.itemsize, {}
        size, test = len(symbols), len(symbols) - held_out
        for split, start, end in (("train", 0, test - held_out), ("valid", test - held_out, test), ("test", test, size)):
            path = split_file(whole.parent, split)
            write_synced(path, (edit(symbols[place : min(place + step, end)].tobytes()) for place in range(start, end, step)))
            entries[split] = dict(zip(("bytes", "sha256"), digest_of(read_chunks(path), "sha256"), strict=True))
        del symbols
        whole.unlink()
        return entries

    def write_meta(self, folder: Path, meta: dict[str, Any]) -> list[str]:
        """Complete the folder with meta.json and return the line to report."""
        write_synced(folder / META, [(json.dumps({"schema": SCHEMA, "name": self.name, **meta}, indent=1) + "\n").encode()])
        sync(folder)
        return [f"prepared {self.out}: {meta['title']}, from {meta['source']}"]


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add --out and --force; `name`: the argument that names the folder."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder to write (default: {name} in the folder of this program)")
    parser.add_argument("--force", action="store_true", help="replace a folder that holds something else")


def run_program(main: Callable[[], int]) -> None:
    """Run `main` and exit. SIGTERM raises, so that an unfinished folder is removed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_main(main)
