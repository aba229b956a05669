"""Prepare a text: its bytes, or the tokens of a model, in train.bin, valid.bin and test.bin, with meta.json (see data/README.md).

    DATA=$(python data/prepare.py enwik8 --fallback pystdlib)
    python data/prepare.py wikipedia-smollm2 --source wikipedia.txt.xz --tokenizer smollm2

The last line of stdout is the folder; everything else goes to stderr.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

import argparse
import codecs
import gzip
import hashlib
import lzma
import os
import re
import struct
import sys
import sysconfig
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
DATA_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA_DIR.parent))

from data.dataset import Parser, TextDataset, count, describe_files, display_path, read_chunks
from utils.data.corpus import UNITS, Corpus, split_file
from utils.data.download import Unavailable, download, log
from utils.data.meta import CHUNK, SPLITS
from utils.data.sources import PYSTDLIB, TEXTS, Text
from utils.data.tokens import load_tokens
from utils.documents import content_of, naming, replace, require_space
from utils.errors import UserError, run_main

PYSTDLIB_BYTES = 8_000_000  # less than the library of any supported Python, so that every version gives the same size
PYSTDLIB_SKIP = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
PYSTDLIB_LOCAL = re.compile(r"_sysconfigdata|config-|sitecustomize|usercustomize")  # files of this machine, not of the library
LEAST_BYTES = 1_000
HELD_OUT = 20  # unless --held_out says otherwise, one byte in 20 is for validation, and as many for the test
PACKED = (".xz", ".gz", ".zip")
# the last three: an encrypted or otherwise unusual zip, and nonsense in the fields of a damaged one
READ_ERRORS = (
    EOFError,
    lzma.LZMAError,
    gzip.BadGzipFile,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    RuntimeError,
    ValueError,
    LookupError,
)
RATIO, SMALL = 250, 1 << 30  # a text of more than SMALL bytes that is RATIO times smaller when it is packed is none
PIECE, PIECES = 1 << 16, 64  # characters that are cut into tokens at once, and how many such pieces side by side
PACKING = 1 << 20  # bytes that a packed file may be larger than its content


# sources


def read_source(path: Path, suffix: str, most: int | None = None) -> Iterator[bytes]:
    """Yield the text in `path`, unpacked where `suffix` is in PACKED. Raises UserError for a truncated or damaged file, and for one that
    unpacks to more than `most` bytes, by default to more than a text can.
    """
    size = path.stat().st_size
    described, count, most = f"{path} ({size:,} bytes)", 0, max(SMALL, RATIO * size) if most is None else most
    try:
        with naming(path), ExitStack() as stack:
            if suffix == ".zip":
                archive = stack.enter_context(zipfile.ZipFile(path))
                members = [member for member in archive.infolist() if not member.is_dir()]
                if len(members) != 1:
                    raise UserError(f"{described} holds {len(members)} files: give a .zip with exactly one")
                file = stack.enter_context(archive.open(members[0]))
            else:
                file = stack.enter_context({".xz": lzma.open, ".gz": gzip.open}.get(suffix, open)(path, "rb"))
            while chunk := file.read(CHUNK):
                count += len(chunk)
                if suffix in PACKED and count > most:
                    raise UserError(f"{described} unpacks to more than {most:,} bytes: give a file with the text alone")
                yield chunk
    except READ_ERRORS as error:
        raise UserError(f"{described} is not a complete {suffix} file ({error}): get the file again") from None


def read_sources(paths: list[Path], published: Text | None = None) -> Iterator[bytes]:
    most = published.bytes + 1 if published else None  # a byte more, so that the refusal is that of another text
    return chain.from_iterable(read_source(path, path.suffix, most) for path in paths)


def stdlib_files(root: Path) -> list[Path]:
    """Return the .py files of the standard library in the order of the sha256 of their relative paths.

    Ordered by name, whole packages would fall into one split (all of xml into test). In hash order the three splits are alike, and
    the order is the same on every machine.
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


def digest_of(chunks: Iterable[bytes], algorithm: str) -> tuple[int, str]:
    """Return the total size of `chunks` in bytes and their hash in hex."""
    size, digest = 0, hashlib.new(algorithm, usedforsecurity=False)
    for chunk in chunks:
        size += len(chunk)
        digest.update(chunk)
    return size, digest.hexdigest()


def published_file(name: str) -> Path:
    """Return the packed or plain file of a published text in the data folder, downloaded where there is none. Raises Unavailable."""
    text = TEXTS[name]
    suffix = Path(text.url).suffix
    target = DATA_DIR / f"{name}{suffix}"

    def check(path: Path) -> None:
        algorithm, _, expected = (text.archive_digest or text.digest).partition(":")
        size, found = digest_of(read_chunks(path) if text.archive_digest else read_source(path, suffix, text.bytes), algorithm)
        if found != expected:
            raise UserError(f"{size:,} bytes with {algorithm} {found}, not {expected}")

    for path in (target, DATA_DIR / name / target.name, DATA_DIR / name / name, DATA_DIR / name):
        if path.is_file():
            return path
    require_space(DATA_DIR, text.bytes)
    remedy = f"put the file at {display_path(target)} by hand, or use --fallback {PYSTDLIB} to prepare Python's own source instead"
    download(text.url, target, check, remedy, text.bytes + PACKING)
    return target


# tokens


def pieces_of(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield a text in pieces, each of about PIECE characters and cut before a newline or else a space, where hardly any token goes on."""
    decoder, rest = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for chunk in chain(chunks, [b""]):
        rest += decoder.decode(chunk, final=not chunk)
        place = 0
        while len(rest) - place > PIECE:
            at = next((at for space in "\n " if (at := rest.rfind(space, place + 1, place + PIECE)) > 0), place)
            while at > place and rest[at - 1].isspace():  # the first of several
                at -= 1
            end = at if at > place else place + PIECE
            yield rest[place:end]
            place = end
        rest = rest[place:]
    if rest:
        yield rest


def tokens_of(chunks: Iterable[bytes], tokenizer) -> Iterator[list[int]]:
    """Yield the tokens of a text in UTF-8 in order, without special tokens; a wrong byte is read as U+FFFD."""
    pieces = pieces_of(chunks)
    while batch := list(islice(pieces, PIECES)):
        for encoded in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield encoded.ids


# the dataset


class ByteText(TextDataset):
    """The bytes of --source, of a published text, or of the standard library."""

    unit = "bytes"
    tokenizer = tokens = None

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, DATA_DIR)
        if args.tokenizer is not None:
            self.unit = "tokens"
            self.tokenizer, tokens = load_tokens(args.tokenizer)
            self.tokens = msgspec.structs.asdict(tokens)
        self.published = TEXTS.get(self.name)
        if self.published:
            self.inputs = frozenset({self.name, f"{self.name}{Path(self.published.url).suffix}"})

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {"official_text": self.args.official_text, "held_out": self.args.held_out}
        found |= {"tokens": self.tokens} if self.tokenizer else {}
        if self.name == PYSTDLIB:
            found["source"] = stdlib_label()
        elif self.args.sources and not self.published:  # a published text is the same from any source
            found["source"] = describe_files(self.args.sources)
        return found

    def other_sources(self, corpus: Corpus) -> str | None:
        sources, recorded = self.args.sources, corpus.meta.get("text", {}).get("sha256")
        if sources and not self.published and digest_of(read_sources(sources), "sha256")[1] != recorded:
            return describe_files(sources)
        return None

    def build(self, folder: Path) -> list[str]:
        if self.name == PYSTDLIB:
            source, chunks, least_size = stdlib_label(), stdlib_chunks(), PYSTDLIB_BYTES
        else:
            paths = self.args.sources or ([published_file(self.name)] if self.published else [])
            if not paths:
                raise UserError(f"{self.name} is not one of {', '.join((*TEXTS, PYSTDLIB))}: give its text with --source FILE")
            source, chunks, least_size = (
                describe_files(paths),
                read_sources(paths, self.published),
                sum(path.stat().st_size for path in paths),
            )
        require_space(folder, 2 * least_size)  # the whole text, then its splits
        algorithm = self.published.digest.partition(":")[0] if self.published else "sha256"
        digest, whole = hashlib.new(algorithm, usedforsecurity=False), folder / "whole"
        with naming(whole), open(whole, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
                require_space(folder, 0)  # the size of a packed text is known only once it is unpacked
        size = whole.stat().st_size
        self.check_content(source, size, f"{algorithm}:{digest.hexdigest()}")
        held_out = size // HELD_OUT if self.args.held_out is None else self.args.held_out
        if not 0 < 2 * held_out < size:
            raise UserError(f"--held_out {held_out} leaves no training text, or nothing to test on, of {source} ({size:,} bytes of text)")
        seen = np.zeros(256, dtype=bool)

        def edit(chunk: bytes) -> bytes:
            chunk = chunk.translate(None, b"\n") if self.args.official_text else chunk
            seen[np.frombuffer(chunk, dtype=np.uint8)] = True
            return chunk

        splits = self.split(whole, held_out, edit)
        if empty := [split for split, entry in splits.items() if not entry["bytes"]]:
            raise UserError(f"nothing of {empty[0]} is left without its newlines: leave out --official_text")
        if self.tokenizer:
            splits, text_bytes = self.tokenized(folder), {split: entry["bytes"] for split, entry in splits.items()}
        meta = {
            "title": self.args.title or self.default_title(size),
            "source": source,
            "text": {"bytes": size, algorithm: digest.hexdigest()},
            "official_text": self.args.official_text,
            **({} if self.args.held_out is None else {"held_out": self.args.held_out}),
            "splits": splits,
            **({"tokens": self.tokens, "text_bytes": text_bytes} if self.tokenizer else {"symbols": int(seen.sum())}),
        }
        return self.write_meta(folder, meta)

    def tokenized(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Replace the bytes of each split by their tokens, and return the entries of meta.json."""
        entries = {}
        for split in SPLITS:
            path = split_file(folder, split)
            tokens = (np.array(ids, UNITS["tokens"].dtype).tobytes() for ids in tokens_of(read_chunks(path), self.tokenizer))
            replace(path, tokens)
            entries[split] = content_of(path)
            log(f"{split}: {entries[split]['bytes'] // UNITS['tokens'].dtype.itemsize:,} tokens")
        return entries

    def check_content(self, source: str, size: int, digest: str) -> None:
        """Refuse a text that is too short or that has the name of a published text and other content."""
        if not self.published:
            if size < LEAST_BYTES:
                raise UserError(f"{source} has {size:,} bytes of text: give at least {LEAST_BYTES:,}")
            return
        file = self.args.sources[0] if self.args.sources else "FILE"
        remedy = f"for a different text choose another name, `python data/prepare.py some_other_name --source {file}`"
        if size != self.published.bytes:
            raise UserError(f"{source} has {size:,} bytes of text, but {self.name} has {self.published.bytes:,}: {remedy}")
        if digest != self.published.digest:
            raise UserError(f"{source} has {digest}, but {self.name} has {self.published.digest}: {remedy}")

    def default_title(self, size: int) -> str:
        """Return the name used in tables: with its size unless the content is verified, so a subset is never labelled as the full set."""
        if self.published:
            title = self.name
        elif self.name == PYSTDLIB:
            title = f"Python {sys.version_info.major}.{sys.version_info.minor} standard library source, {size / 1e6:.1f} MB"
        else:
            names = " + ".join(path.stem if path.suffix in PACKED else path.name for path in self.args.sources)
            title = f"{names}, {size / 1e6:.2f} MB" if size >= 10_000 else f"{names}, {size:,} bytes"
        return f"{title}, newlines dropped" if self.args.official_text else title


# the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises UserError for values that cannot be used."""
    parser = Parser(description="Prepare the bytes of a text, or a model's tokens of it, and print its folder.")
    parser.add_argument("name", metavar="NAME", help=f"{', '.join(TEXTS)}, {PYSTDLIB}, or any name together with --source")
    source_help = "plain, .xz, .gz or .zip file; repeat it to join several"
    parser.add_argument("--source", dest="sources", metavar="FILE", type=Path, action="append", default=[], help=source_help)
    tokenizer_help = "folder of a model of the transformers library: cut the text into its tokens, by its tokenizer.json"
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help=tokenizer_help)
    parser.add_argument("--title", help="name of the text in tables (default: from its name and size)")
    parser.add_argument("--official_text", action="store_true", help="drop newlines, as the official code does")
    held_out_help = "bytes for validation, and as many for the test (default: a twentieth of the text each)"
    parser.add_argument("--held_out", metavar="BYTES", type=count, help=held_out_help)
    parser.add_argument("--fallback", choices=[PYSTDLIB], help="prepare this instead if the text cannot be downloaded")
    parser.add_common("NAME", verify=True)
    args = parser.parse_args(argv)
    if args.sources and args.name == PYSTDLIB:
        raise UserError(f"{PYSTDLIB} is read from Python itself: leave out --source, or choose another name")
    if args.held_out is not None and args.name in TEXTS:
        raise UserError(f"{args.name} is split as published: leave out --held_out, or choose another name")
    if args.held_out is not None and args.held_out < 1:
        raise UserError(f"--held_out {args.held_out} leaves nothing to test on: give at least 1 byte")
    for name in TEXTS:
        if args.title is not None and args.title.strip().lower() == name != args.name:
            raise UserError(f"--title {args.title!r} is reserved for the verified text of that name: choose another title")
    for path in args.sources:
        if not path.is_file():
            raise UserError(f"--source {path} is not a file: give a plain, .xz, .gz or .zip file")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command: see the module's docstring."""
    args = parse(argv)
    try:
        folder = ByteText(args).prepare()
    except Unavailable as error:
        if not args.fallback:
            raise
        log(f"{error.fault}: preparing {PYSTDLIB} instead")
        folder = ByteText(argparse.Namespace(**vars(args) | {"name": PYSTDLIB, "out": None, "title": None})).prepare()
    print(folder)
    return 0


if __name__ == "__main__":
    run_main(main)
