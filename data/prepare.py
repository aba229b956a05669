"""Prepares a text for byte-level training: a folder of train.bin, valid.bin, test.bin and meta.json (see data/README.md).

The last line on stdout is the folder, everything else goes to stderr: DATA=$(python data/prepare.py enwik8 --fallback pystdlib)
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import signal
import sys
import sysconfig
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

DATA_DIR = Path(__file__).resolve().parent
if str(DATA_DIR.parent) not in sys.path:
    sys.path.insert(0, str(DATA_DIR.parent))

from utils.data.corpus import CHUNK, META, SCHEMA, SPLITS, Corpus, digest_of, read_chunks, split_file  # noqa: E402
from utils.data.download import Unavailable, download, log  # noqa: E402
from utils.errors import UserError, run_main  # noqa: E402

PYSTDLIB = "pystdlib"
PYSTDLIB_BYTES = 8_000_000  # less than any supported Python has, so that every version gives the same size
PYSTDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
PYSTDLIB_LOCAL = re.compile(r"_sysconfigdata|config-|sitecustomize|usercustomize")  # this machine's own, not the library's
LEAST_BYTES = 1_000
SPACE_MARGIN = 16 << 20  # bytes of disk left free
READ_ERRORS = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, RuntimeError)  # the last: an encrypted zip
PACKED = (".xz", ".gz", ".zip")


@dataclass(frozen=True)
class Known:
    """A text with a fixed content. `digest`: of its `bytes` bytes, in hex; `zip_sha256`: of the file at `url`, where known."""

    url: str
    bytes: int
    algorithm: str
    digest: str
    zip_sha256: str | None = None


KNOWN = {
    "enwik8": Known(
        "http://mattmahoney.net/dc/enwik8.zip",
        100_000_000,
        "sha256",
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
    "text8": Known("http://mattmahoney.net/dc/text8.zip", 100_000_000, "md5", "3bea1919949baf155f99411df5fada7e"),
}


@dataclass(frozen=True)
class Job:
    """The command line."""

    name: str
    sources: list[Path]
    out: Path
    title: str | None
    official_text: bool
    fallback: str | None
    force: bool
    verify: bool


class Text(NamedTuple):
    """A text before it is split, not yet read."""

    source: str  # where it is from, for meta.json
    chunks: Iterator[bytes]
    least_bytes: int  # at least its size, for the disk check


def refuse_source(path: Path, fault: object) -> NoReturn:
    raise UserError(f"{path} ({path.stat().st_size:,} bytes) {fault}") from None


@contextmanager
def open_source(path: Path, suffix: str) -> Iterator[BinaryIO]:
    """The text in `path`: unpacked where `suffix` is in PACKED, else as it is. A UserError names a file that is not whole."""
    try:
        if suffix == ".zip":
            with zipfile.ZipFile(path) as archive, archive.open(zip_member(path, archive)) as file:
                yield file
        else:
            with {".xz": lzma.open, ".gz": gzip.open}.get(suffix, open)(path, "rb") as file:
                yield file
    except READ_ERRORS as error:
        refuse_source(path, f"is not a whole {suffix} file: {error}")


def zip_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        refuse_source(path, f"holds {len(members)} files: a .zip with exactly one is needed")
    return members[0]


def source_chunks(path: Path, suffix: str) -> Iterator[bytes]:
    with open_source(path, suffix) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def joined_chunks(sources: list[Path]) -> Iterator[bytes]:
    return chain.from_iterable(source_chunks(path, path.suffix) for path in sources)


def source_bytes(path: Path) -> int:
    """The text's size in bytes where it costs nothing to know (plain, .zip); else that of the packed file, a lower bound."""
    if path.suffix != ".zip":
        return path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            return zip_member(path, archive).file_size
    except zipfile.BadZipFile:
        return 0  # refused, with its reason, when it is read


def source_label(sources: list[Path]) -> str:
    return " + ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in sources)


def stdlib_files(root: Path) -> list[Path]:
    """The library's .py files in the order of the sha256 of their relative paths.

    By name, whole packages would fall into one split (all of xml into test); in hash order the three splits are alike,
    and the order is the same on every machine.
    """
    found = {}
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not PYSTDLIB_SKIP & set(relative.parts) and not PYSTDLIB_LOCAL.match(relative.parts[0]):
            found[hashlib.sha256(relative.as_posix().encode()).digest()] = path
    return [found[key] for key in sorted(found)]


def stdlib_chunks() -> Iterator[bytes]:
    left = PYSTDLIB_BYTES
    for path in stdlib_files(Path(sysconfig.get_path("stdlib"))):
        content = path.read_bytes()[:left]
        yield content
        left -= len(content)
        if not left:
            return


def stdlib_label() -> str:
    return f"Python {sys.version.split()[0]} standard library"


# downloading


def check_download(path: Path, known: Known) -> None:
    """Raises UserError unless `path` is the zip of `known`, by its own hash or, where that is not recorded, by its content's."""
    chunks = read_chunks(path) if known.zip_sha256 else source_chunks(path, ".zip")
    size, found = digest_of(chunks, "sha256" if known.zip_sha256 else known.algorithm)
    expected = known.zip_sha256 or known.digest
    if found != expected:
        raise UserError(f"{size:,} bytes with hash {found}, not {expected}")


def known_file(name: str, known: Known, data_dir: Path) -> Path:
    """The zip or raw file of a known text in `data_dir`, downloaded where there is none. Raises Unavailable."""
    target = data_dir / f"{name}.zip"
    for path in (target, data_dir / name / target.name, data_dir / name / name, data_dir / name):
        if path.is_file():
            return path
    remedy = f"put the file at {shown(target)} by hand, or use --fallback {PYSTDLIB} to prepare Python's own source instead"
    require_space(data_dir, known.bytes)  # of the zip, which is smaller than its text
    download(known.url, target, lambda path: check_download(path, known), remedy)
    return target


# writing


def require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    needed = size + SPACE_MARGIN
    if free < needed:
        raise UserError(f"{folder} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed: make room, or choose another --out")


def write_synced(path: Path, chunks: Iterable[bytes]) -> None:
    with open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes renames within `folder` durable, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_text(job: Job, text: Text, known: Known | None, size: int, digest: str) -> None:
    """Refuses a text that is too short or, under the name of a known text, another text."""
    if known is None:
        if size < LEAST_BYTES:
            raise UserError(f"{text.source} gives a text of {size:,} bytes: at least {LEAST_BYTES:,} are needed")
        return
    file = job.sources[0] if job.sources else "FILE"
    other = f"for a different text choose another name, `python data/prepare.py some_other_name --source {file}`"
    if size != known.bytes:
        raise UserError(f"{text.source} gives {size:,} bytes, but {job.name} has {known.bytes:,}: {other}")
    if digest != known.digest:
        raise UserError(f"{text.source} has {known.algorithm} {digest}, but {job.name} has {known.digest}: {other}")


def write_split(whole: np.ndarray, path: Path, official_text: bool, seen: np.ndarray) -> dict[str, Any]:
    """Writes the uint8 [bytes] array to `path`, marks its symbols in `seen` (bool [256]) and returns the meta.json entry."""
    size, digest = 0, hashlib.sha256()

    def chunks() -> Iterator[bytes]:
        nonlocal size
        for start in range(0, len(whole), CHUNK):
            chunk = whole[start : start + CHUNK].tobytes()
            chunk = chunk.translate(None, b"\n") if official_text else chunk
            seen[np.frombuffer(chunk, dtype=np.uint8)] = True
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    write_synced(path, chunks())
    if not size:
        raise UserError(f"nothing of {path.stem} is left without its newlines: leave out --official_text")
    return {"bytes": size, "sha256": digest.hexdigest()}


def default_title(job: Job, known: Known | None, size: int) -> str:
    """What tables call this text: with its size, unless its content is verified, lest a part pass for the whole."""
    if known:
        title = job.name
    elif job.name == PYSTDLIB:
        title = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library source, {size / 1e6:.1f} MB"
    else:
        names = " + ".join(path.stem if path.suffix in PACKED else path.name for path in job.sources)
        title = f"{names}, {size / 1e6:.2f} MB" if size >= 10_000 else f"{names}, {size:,} bytes"
    return f"{title}, newlines dropped" if job.official_text else title


def build(job: Job, text: Text, known: Known | None, folder: Path) -> None:
    """Writes the four files into the empty `folder`, meta.json last."""
    algorithm = known.algorithm if known else "sha256"
    require_space(folder, 2 * text.least_bytes)  # the whole text, then its splits
    digest, whole_file = hashlib.new(algorithm, usedforsecurity=False), folder / "whole"
    with open(whole_file, "wb") as file:
        for chunk in text.chunks:
            digest.update(chunk)
            file.write(chunk)
            require_space(folder, 0)  # a packed text tells its size only as it unfolds
    size = whole_file.stat().st_size
    check_text(job, text, known, size, digest.hexdigest())
    require_space(folder, size)
    whole, seen, held = np.memmap(whole_file, dtype=np.uint8, mode="r"), np.zeros(256, dtype=bool), size // 20
    ends = {"train": (0, size - 2 * held), "valid": (size - 2 * held, size - held), "test": (size - held, size)}
    entries = {split: write_split(whole[slice(*ends[split])], split_file(folder, split), job.official_text, seen) for split in SPLITS}
    del whole
    whole_file.unlink()
    meta = {
        "schema": SCHEMA,
        "name": job.name,
        "title": job.title or default_title(job, known, size),
        "source": text.source,
        "text": {"bytes": size, algorithm: digest.hexdigest()},
        "official_text": job.official_text,
        "splits": entries,
        "symbols": int(seen.sum()),
    }
    write_synced(folder / META, [(json.dumps(meta, indent=1) + "\n").encode()])
    sync_folder(folder)


def install(built: Path, out: Path) -> None:
    """Puts the finished folder at `out`: one rename or, into a folder that is there, file by file with meta.json last.

    Without meta.json a folder is not accepted, so a reader finds the old text, none or the new one, never a mixture.
    """
    if out.exists():
        (out / META).unlink(missing_ok=True)
        sync_folder(out)
        for path in (*(split_file(built, split) for split in SPLITS), built / META):
            os.replace(path, out / path.name)
        sync_folder(out)
    else:
        os.rename(built, out)
    sync_folder(out.parent)


def shown(path: Path) -> Path:
    """`path` as seen from the working folder where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# the command


def text_of(job: Job, known: Known | None, data_dir: Path) -> Text:
    """Finds the text to prepare, without reading it. Raises Unavailable for a known text that is nowhere."""
    if job.name == PYSTDLIB:
        return Text(stdlib_label(), stdlib_chunks(), PYSTDLIB_BYTES)
    sources = job.sources or ([known_file(job.name, known, data_dir)] if known else [])
    if not sources:
        raise UserError(f"{job.name} is not one of {', '.join((*KNOWN, PYSTDLIB))}: give its text with --source FILE")
    return Text(source_label(sources), joined_chunks(sources), sum(map(source_bytes, sources)))


def already_there(job: Job, known: Known | None) -> bool:
    """True where `job.out` is what the job asks for, False where it can be written; a UserError where it holds something else."""
    out = job.out
    if not out.exists() or (out.is_dir() and job.force):
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file, not a folder: choose another --out, or move it")
    if not (out / META).exists():
        other = sorted({path.name for path in out.iterdir()} - {job.name, f"{job.name}.zip"})
        if other:
            raise UserError(f"{out} holds {other[0]} but no {META}: choose another --out, or replace its splits with --force")
        return False
    corpus = Corpus.open(out)
    wanted: dict[str, Any] = {"name": job.name, "official_text": job.official_text}
    if job.title:
        wanted["title"] = job.title
    if job.name == PYSTDLIB:
        wanted["source"] = stdlib_label()
    elif job.sources and known is None:  # a known text is the same from any source
        wanted["source"] = source_label(job.sources)
    for key, value in wanted.items():
        if corpus.meta[key] != value:
            raise UserError(f"{out} has {key} {corpus.meta[key]!r}, not {value!r}: choose another --out, or replace it with --force")
    if job.verify:
        corpus.verify()
        if "source" in wanted and job.sources and digest_of(joined_chunks(job.sources), "sha256")[1] != corpus.meta["text"]["sha256"]:
            raise UserError(f"{out} was made from another content of {wanted['source']}: choose another --out, or replace it with --force")
    return True


def prepare(job: Job, known: Known | None, data_dir: Path) -> Path:
    """Prepares what the command line asks for; returns its folder. Leaves nothing behind when it fails."""
    for path in job.sources:
        if not path.is_file():
            raise UserError(f"--source {path} is not a file: give a plain, .xz, .gz or .zip file")
    if already_there(job, known):
        log(f"already prepared{' and verified' if job.verify else ''}: {job.out}")
        return job.out
    text = text_of(job, known, data_dir)
    out = job.out.resolve()  # the place behind a link, so that the folder is built on the same disk
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    building.mkdir()
    try:
        build(job, text, known, building)
        install(building, out)
    except OSError:
        if not already_there(job, known):  # else another process was faster, with the same
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    log(f"prepared {job.out}: {Corpus.open(out).title}, from {text.source}")
    return job.out


def folder_name(name: str) -> str:
    """The name, or a UserError where it cannot be a folder's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"the name {name!r} cannot be that of a folder: use letters, digits, '.', '_' and '-'")
    return name


def parse(argv: list[str] | None, known: dict[str, Known], data_dir: Path) -> Job:
    """The command line, with what is wrong in itself refused as a UserError."""
    parser = argparse.ArgumentParser(description="Prepare a text for byte-level training; prints the prepared folder.")
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(known)}, {PYSTDLIB}, or any name together with --source")
    source_help = "plain, .xz, .gz or .zip file; repeat it to join several"
    parser.add_argument("--source", dest="sources", metavar="FILE", type=Path, action="append", default=[], help=source_help)
    parser.add_argument("--out", type=Path, help="folder to write (default: NAME in the folder of this program)")
    parser.add_argument("--title", help="the text's name in tables (default: from its name and size)")
    parser.add_argument("--official_text", action="store_true", help="drop newlines, as the official code's stream does")
    parser.add_argument("--fallback", choices=[PYSTDLIB], help="prepare this where enwik8 or text8 cannot be had")
    parser.add_argument("--force", action="store_true", help="replace the splits in a folder that holds something else")
    parser.add_argument("--verify", action="store_true", help="hash a folder that is already prepared instead of trusting its sizes")
    args = parser.parse_args(argv)
    folder_name(args.name)
    if args.sources and args.name == PYSTDLIB:
        raise UserError(f"{PYSTDLIB} is read from Python itself: leave out --source, or choose another name")
    for name in known:
        if args.title is not None and args.title.strip().lower() == name != args.name:
            raise UserError(f"--title {args.title!r} is the name of another text: only {name}, verified, is called that")
    return Job(**{**vars(args), "out": args.out or shown(data_dir / args.name)})


def main(argv: list[str] | None = None, known: dict[str, Known] = KNOWN, data_dir: Path = DATA_DIR) -> int:
    """The command; `known` and `data_dir` let tests use their own texts, address and folder."""
    job = parse(argv, known, data_dir)
    try:
        try:
            folder = prepare(job, known.get(job.name), data_dir)
        except Unavailable as error:
            if not job.fallback:
                raise
            log(f"{error.fault}: preparing {PYSTDLIB} instead")
            folder = prepare(replace(job, name=PYSTDLIB, out=shown(data_dir / PYSTDLIB), title=None), None, data_dir)
    except OSError as error:
        raise UserError(f"{error.filename or job.out}: {error.strerror or error}") from None
    print(folder)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that an unfinished folder is removed
    run_main(main)
