"""Write the folder of a dataset: built under another name, installed by renaming, and kept if it is already prepared."""

from __future__ import annotations

import argparse
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from smoe_dropout.folders import held, remove, temporary
from utils import documents, errors
from utils.data.corpus import UNITS, Corpus, split_file
from utils.data.download import log
from utils.data.meta import CHUNK, META, SCHEMA, SPLITS, TOKENIZER, tokenizer_fault
from utils.documents import require_space
from utils.errors import UserError

MOVE = "choose another --out, or move it"
REPLACE = "choose another --out, or replace it with --force"
LEFTOVER = r"\.{name}\.[0-9a-f]{{8}}\.(tmp|old)"  # a folder that is being built, or replaced
LONGEST_TITLE, LARGEST_COUNT = 200, 1 << 62


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, at most CHUNK bytes at a time."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


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


def remove_leftovers(out: Path) -> None:
    """Remove what killed processes left beside `out`, and put back a folder that one of them was about to replace.

    A folder stays that another process uses, and where no locks tell this.
    """
    pattern = re.compile(LEFTOVER.format(name=re.escape(out.name)))
    for path in sorted(out.parent.iterdir()) if out.parent.is_dir() else ():
        if pattern.fullmatch(path.name):
            with suppress(OSError), held(path) as free:
                if free and path.suffix == ".old" and not out.exists():
                    os.rename(path, out)
                elif free:
                    remove(path)


def install(built: Path, out: Path) -> None:
    """Move the finished folder to `out`. A reader of `out` finds the old files, none, or the new ones, never a mixture.

    Entries of a prepared text are replaced one by one, so that other files in its folder stay: meta.json, without which the text is
    refused, is removed first and written last. Any other folder is replaced entirely.
    """
    if not out.exists():
        os.rename(built, out)
        documents.sync(out.parent)
    elif (built / META).exists():
        (out / META).unlink(missing_ok=True)
        documents.sync(out)
        for path in sorted(built.iterdir(), key=lambda path: path.name == META):
            if path.is_dir():
                remove(out / path.name)
            os.replace(path, out / path.name)
        documents.sync(out)
    elif Path.cwd().is_relative_to(out):
        raise UserError(f"{out} is the working folder, which cannot be replaced: start the program from another")
    else:
        old = built.with_suffix(".old")
        with held(out) as free:
            if free is False:
                raise UserError(f"{out} is being replaced by another process: wait for it, or choose another --out")
            try:
                os.rename(out, old)
                os.rename(built, out)
                documents.sync(out.parent)
            finally:
                if old.exists() and not out.exists():
                    os.rename(old, out)
                with suppress(OSError):
                    os.rename(old, built)  # under its first name `remove_leftovers` would put it back where `out` has gone


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
        title = getattr(args, "title", None)
        if title and not (title.isprintable() and len(title) <= LONGEST_TITLE):
            raise UserError(f"--title {title[:40]!r} cannot be shown in tables: give at most {LONGEST_TITLE} characters in one line")
        self.args, self.name = args, args.name
        self.out: Path = args.out or display_path(data_dir / args.name)

    @abstractmethod
    def owns(self, name: str) -> bool:
        """Say whether the file `name`, relative to the folder, belongs to it: `--force` never touches a folder with other files."""

    @abstractmethod
    def check(self, found: list[str]) -> None:
        """Raise UserError unless the files `found` in the folder are the dataset asked for."""

    @abstractmethod
    def build(self, folder: Path) -> list[str]:
        """Write everything into the empty `folder` and return the lines to report. Raises UserError for unusable input."""

    def is_ready(self) -> bool:
        """Say whether the dataset is already prepared. Raises UserError if its folder holds something else."""
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
            remove_leftovers(self._place())
            log("\n".join([f"already prepared: {self.out}"] if self.is_ready() else self._install()))
        except OSError as error:
            if not self._is_below(error.filename):
                raise
            reason = error.strerror or error
            raise UserError(f"{self.out} cannot be written ({reason}): choose another --out, or fix this") from None
        return self.out

    def _is_below(self, filename: str | None) -> bool:
        """Say whether a file is the folder, in it or above it, or in the one that is being built."""
        out, place = self._place(), Path(os.path.realpath(filename or os.devnull))
        built = re.compile(LEFTOVER.format(name=re.escape(out.name)))
        return place in (out, *out.parents) or out in place.parents or any(map(built.fullmatch, place.parts))

    def _place(self) -> Path:
        """The folder itself behind a link, so that it is built on the same disk."""
        return Path(os.path.realpath(self.out))

    def _install(self) -> list[str]:
        out = self._place()
        created = [folder for folder in out.parents if not folder.exists()]
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with temporary(out.parent, f".{out.name}.", ".tmp") as folder:
                lines = self.build(folder)
                install(folder, out)
            return lines
        except OSError:
            if not self.is_ready():  # else another process has installed the same in the meantime
                raise
            return [f"already prepared: {self.out}"]
        finally:
            for folder in created:
                with suppress(OSError):  # it is not empty, or was not made
                    folder.rmdir()


class TextDataset(Dataset):
    """A text as `utils.data.corpus` reads it: three splits and meta.json."""

    unit: str  # one of UNITS

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the entries of meta.json by which a prepared folder is recognised."""

    def other_sources(self, corpus: Corpus) -> str | None:
        """The sources, with --verify, if they are at hand and would give another text."""

    def owns(self, name: str) -> bool:
        """Other files may be kept beside a prepared text, but not in a folder without meta.json."""
        known = {META, TOKENIZER, *(split_file(self.out, split).name for split in SPLITS)}
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
        if fault := tokenizer_fault(self.out, corpus.meta):
            raise UserError(f"{fault}: {REPLACE}")
        if self.args.verify:
            corpus.verify()
            if fault := self.other_sources(corpus):
                raise UserError(f"{self.out} was made from other content of {fault}: {REPLACE}")
            log(f"verified: {self.out}")

    def split(self, whole: Path, held_out: int, edit: Callable[[bytes], bytes] = bytes) -> dict[str, dict[str, Any]]:
        """Replace the file `whole` by train, valid and test, in the order of the text, and return their entries for meta.json.

        `held_out` symbols are for valid and as many for test; `edit` is applied to each chunk that is written.
        """
        dtype = UNITS["bytes" if self.unit == "tokens" else self.unit].dtype  # a text is cut into tokens after its splits
        require_space(whole.parent, whole.stat().st_size)
        symbols, step, entries = np.memmap(whole, dtype, mode="r"), CHUNK // dtype.itemsize, {}
        size, test = len(symbols), len(symbols) - held_out
        for split, start, end in (("train", 0, test - held_out), ("valid", test - held_out, test), ("test", test, size)):
            path = split_file(whole.parent, split)
            documents.replace(path, (edit(symbols[place : min(place + step, end)].tobytes()) for place in range(start, end, step)))
            entries[split] = documents.content_of(path)
        del symbols
        whole.unlink()
        return entries

    def write_meta(self, folder: Path, meta: dict[str, Any]) -> list[str]:
        """Complete the folder with meta.json and return the line to report."""
        documents.write(folder / META, {"schema": SCHEMA, "name": self.name, **meta})
        return [f"prepared {self.out}: {meta['title']}, from {meta['source']}"]


class Parser(errors.Parser):
    """Reads the command line of a program."""

    def add_common(self, name: str, verify: bool = False) -> None:
        """Add --out, --force and with `verify` --verify; `name`: the argument that names the folder."""
        self.add_argument("--out", type=Path, metavar="DIR", help=f"folder to write (default: {name} in the folder of this program)")
        self.add_argument("--force", action="store_true", help="replace a folder that holds something else")
        if verify:
            self.add_argument("--verify", action="store_true", help="hash a folder that is already prepared instead of trusting its sizes")


def count(text: str) -> int:
    """The type of arguments that count bytes or pieces."""
    with suppress(ValueError):
        if (value := int(text)) <= LARGEST_COUNT:
            return value
    raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number up to {LARGEST_COUNT:,}")
