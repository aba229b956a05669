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
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
DATA_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA_DIR.parent))

from data.dataset import Parser, TextDataset, count, describe_files, read_chunks
from data.reading import (
    PACKED,
    PYSTDLIB_BYTES,
    digest_of,
    pieces_of,
    published_file,
    read_archive,
    read_sources,
    stdlib_chunks,
    stdlib_label,
    tokens_of,
)
from utils.data.corpus import UNITS, Corpus, split_file
from utils.data.download import Unavailable, log
from utils.data.meta import SPLITS, TOKENIZER
from utils.data.sources import PYSTDLIB, TEXTS, Archive
from utils.data.tokens import load_tokens
from utils.data.vocabulary import KINDS, PAIRS, SPACES, Learned, save
from utils.documents import content_of, naming, replace, require_space, sync
from utils.errors import UserError, run_main

LEAST_BYTES = 1_000
HELD_OUT = 20  # unless --held_out says otherwise, one byte in 20 is for validation, and as many for the test
WHOLE = "whole"  # a text that is not given by its splits


# the dataset


class PlainText(TextDataset):
    """The bytes or tokens of --source, of a published text, or of the standard library."""

    unit = "bytes"
    tokenizer = tokens = learned = None

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args, DATA_DIR)
        self.published = TEXTS.get(self.name)
        if self.published:
            self.inputs = frozenset({self.name, f"{self.name}{Path(self.published.url).suffix}"})
        if args.tokenizer is not None:
            self.tokenizer, tokens = load_tokens(args.tokenizer)
            self.tokens = msgspec.structs.asdict(tokens)
        elif kind := args.vocabulary or (SPACES if isinstance(self.published, Archive) else None):
            self.learned = Learned(kind, args.min_frequency or 1, args.vocabulary_size, args.lower_case)
        if self.tokenizer or self.learned:
            self.unit = "tokens"

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {"official_text": self.args.official_text, "held_out": self.args.held_out}
        found |= {"tokens": self.tokens} if self.tokenizer else {"learned": self.learned and self.learned._asdict()}
        if self.name == PYSTDLIB:
            found["source"] = stdlib_label()
        elif self.args.sources and not self.published:  # a published text is the same from any source
            found["source"] = describe_files(self.files)
        return found

    @property
    def files(self) -> list[Path]:
        """The files given, in the order of the text."""
        return [*self.args.sources, *filter(None, (self.args.valid, self.args.test))]

    def other_sources(self, corpus: Corpus) -> str | None:
        recorded = corpus.meta.get("text", {}).get("sha256")
        if self.files and not self.published and digest_of(read_sources(self.files), "sha256")[1] != recorded:
            return describe_files(self.files)
        return None

    def parts(self) -> tuple[str, int, dict[str, Iterator[bytes]]]:
        """A description of the sources, their least size in bytes, and their text: WHOLE, or its splits in order."""
        if self.name == PYSTDLIB:
            return stdlib_label(), PYSTDLIB_BYTES, {WHOLE: stdlib_chunks()}
        paths = self.files or ([published_file(self.name, DATA_DIR)] if self.published else [])
        if not paths:
            raise UserError(f"{self.name} is not one of {', '.join((*TEXTS, PYSTDLIB))}: give its text with --source FILE")
        described = describe_files(paths), sum(path.stat().st_size for path in paths)
        if isinstance(self.published, Archive):
            self.check_archive(paths)
            return *described, {split: read_archive(paths[0], self.published.members[split]) for split in SPLITS}
        if self.args.valid:
            by_split = zip(SPLITS, (self.args.sources, [self.args.valid], [self.args.test]), strict=True)
            return *described, {split: read_sources(files) for split, files in by_split}
        return *described, {WHOLE: read_sources(paths, self.published)}

    def build(self, folder: Path) -> list[str]:
        source, least_size, parts = self.parts()
        require_space(folder, (2 if WHOLE in parts else 1) * least_size)  # the whole text, then its splits
        algorithm = self.published.digest.partition(":")[0] if self.published and WHOLE in parts else "sha256"
        digest, size, seen = hashlib.new(algorithm, usedforsecurity=False), 0, np.zeros(256, dtype=bool)

        def edit(chunk: bytes) -> bytes:
            chunk = chunk.translate(None, b"\n") if self.args.official_text else chunk
            seen[np.frombuffer(chunk, dtype=np.uint8)] = True
            return chunk

        for part, chunks in parts.items():
            path = folder / WHOLE if part == WHOLE else split_file(folder, part)
            with naming(path), open(path, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    size += len(chunk)
                    file.write(chunk if part == WHOLE else edit(chunk))
                    require_space(folder, 0)  # the size of a packed text is known only once it is unpacked
            sync(path)
        self.check_content(source, size, f"{algorithm}:{digest.hexdigest()}")
        if WHOLE in parts:
            held_out = size // HELD_OUT if self.args.held_out is None else self.args.held_out
            if not 0 < 2 * held_out < size:
                raise UserError(
                    f"--held_out {held_out} leaves no training text, or nothing to test on, of {source} ({size:,} bytes of text)"
                )
            splits = self.split(folder / WHOLE, held_out, edit)
        else:
            splits = {split: content_of(split_file(folder, split)) for split in SPLITS}
        if empty := [split for split, entry in splits.items() if not entry["bytes"]]:
            remedy = "leave out --official_text" if self.args.official_text else "give a text"
            raise UserError(f"nothing of {empty[0]} is left: {remedy}")
        meta = {
            "title": self.args.title or self.default_title(size),
            "source": source,
            "text": {"bytes": size, algorithm: digest.hexdigest()},
            "official_text": self.args.official_text,
            **({} if self.args.held_out is None else {"held_out": self.args.held_out}),
        }
        if self.unit == "bytes":
            return self.write_meta(folder, meta | {"splits": splits, "symbols": int(seen.sum())})
        text_bytes = {split: entry["bytes"] for split, entry in splits.items()}
        if self.learned:
            meta |= self.learn(folder)
        return self.write_meta(folder, meta | {"splits": self.tokenized(folder), "tokens": self.tokens, "text_bytes": text_bytes})

    def learn(self, folder: Path) -> dict[str, Any]:
        """Learn the tokenizer from the training text, save it in the folder, and return its entries of meta.json."""
        tokenizer = self.learned.tokenizer(pieces_of(read_chunks(split_file(folder, "train"))))
        files = save(tokenizer, folder)
        self.tokenizer, tokens = load_tokens(folder / TOKENIZER)
        self.tokens = msgspec.structs.asdict(tokens) | {"name": self.name}
        log(f"vocabulary: {tokens.size:,} tokens")
        return {"learned": self.learned._asdict(), "files": {name: content_of(path) for name, path in files.items()}}

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

    def check_archive(self, paths: list[Path]) -> None:
        """Refuse anything but the published archive."""
        if len(paths) > 1:
            raise UserError(f"{self.name} is one archive: give a single --source")
        algorithm, _, expected = self.published.archive_digest.partition(":")
        size, found = digest_of(read_chunks(paths[0]), algorithm)
        if found != expected:
            raise UserError(
                f"{paths[0]} has {size:,} bytes with {algorithm} {found}, and {self.name} is published with {expected}: get the file "
                "again, or choose another name for another text"
            )

    def check_content(self, source: str, size: int, digest: str) -> None:
        """Refuse a text that is too short or that has the name of a published text and other content."""
        if size < LEAST_BYTES:
            raise UserError(f"{source} has {size:,} bytes of text: give at least {LEAST_BYTES:,}")
        if not self.published or isinstance(self.published, Archive):
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
    learned_help = (
        "make the text's tokens: its words between spaces, or with punctuation apart, or byte pairs, learned from the training text"
    )
    parser.add_argument("--vocabulary", choices=KINDS, help=learned_help)
    parser.add_argument("--vocabulary_size", type=count, metavar="N", help="tokens at most (default: all words, 8192 byte pairs)")
    parser.add_argument("--min_frequency", type=count, metavar="N", help="occurrences that a word needs, others are <unk> (default: 1)")
    parser.add_argument("--lower_case", action="store_true", help="with --vocabulary: read capitals as small letters")
    parser.add_argument("--valid", type=Path, metavar="FILE", help="validation text, where --source is the training text; needs --test")
    parser.add_argument("--test", type=Path, metavar="FILE", help="test text; needs --valid")
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
    _check_vocabulary(args)
    if bool(args.valid) != bool(args.test) or (args.valid and (args.held_out is not None or not args.sources or args.name in TEXTS)):
        raise UserError("--valid and --test go together, with --source, for a text that is not published, and without --held_out")
    for path in [*args.sources, *filter(None, (args.valid, args.test))]:
        if not path.is_file():
            raise UserError(f"--source {path} is not a file: give a plain, .xz, .gz or .zip file")
    return args


def _check_vocabulary(args: argparse.Namespace) -> None:
    """Refuse options of a vocabulary that have no effect or contradict each other."""
    words = isinstance(TEXTS.get(args.name), Archive)
    if args.tokenizer is not None and args.vocabulary is not None:
        raise UserError("--tokenizer gives a vocabulary and --vocabulary learns one: leave one out")
    if args.vocabulary is None and not (words and args.tokenizer is None):
        for name in ("vocabulary_size", "min_frequency", "lower_case"):
            if getattr(args, name):
                raise UserError(f"--{name} needs --vocabulary: say what is learned, {', '.join(KINDS)}")
    if args.vocabulary == PAIRS and args.min_frequency:
        raise UserError(f"--min_frequency has no effect with --vocabulary {PAIRS}: leave it out")
    if args.vocabulary_size is not None and args.vocabulary_size < (least := 257 if args.vocabulary == PAIRS else 3):
        raise UserError(f"--vocabulary_size {args.vocabulary_size} is too small: give at least {least}")
    if args.official_text and (args.vocabulary or words):
        raise UserError("--official_text drops the newlines, which end a sentence of words: leave it out")


def main(argv: list[str] | None = None) -> int:
    """Run the command: see the module's docstring."""
    args = parse(argv)
    try:
        folder = PlainText(args).prepare()
    except Unavailable as error:
        if not args.fallback:
            raise
        log(f"{error.fault}: preparing {PYSTDLIB} instead")
        folder = PlainText(argparse.Namespace(**vars(args) | {"name": PYSTDLIB, "out": None, "title": None})).prepare()
    print(folder)
    return 0


if __name__ == "__main__":
    run_main(main)
