"""Prepare a text for BERT or RoBERTa: word pieces in train.bin, valid.bin and test.bin, meta.json, the tokenizer (see data/README.md).

    python data/prepare_pieces.py books-bert-base-uncased --tokenizer bert-base-uncased --data_files a.txt b.txt.xz
    python data/prepare_pieces.py bookcorpus-roberta-base --tokenizer roberta-base --hub bookcorpus/bookcorpus@refs/convert/parquet

The last line of stdout is the folder; everything else goes to stderr.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

import argparse
import errno
import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
DATA_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA_DIR.parent))

from data.dataset import Parser, TextDataset, count, describe_files, refuse_unreadable
from utils.data.download import log
from utils.data.meta import TOKENIZER, files_below
from utils.data.tokenizer import label_of, load_tokenizer, note_moving, vocabulary_of
from utils.documents import content_of, naming, require_space, sync
from utils.errors import UserError, run_main

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}  # anything else is text, a paragraph per line
HELD_OUT = 100  # one piece in 100 is for validation, and as many for the test
LINES = 1000  # tokenized at once
LEAST_PIECES = 1000


def file_format(path: Path) -> str:
    """Return the name that `datasets` has for the format of a file."""
    return BUILDERS.get(Path(path.name.lower().removesuffix(".xz").removesuffix(".gz")).suffix, "text")


def source_label(args: argparse.Namespace) -> str:
    return args.hub or describe_files(args.data_files)


def read_texts(args: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the texts in order, up to LINES at a time. Raises UserError where they cannot be read, or the column holds no texts."""
    from datasets import load_dataset

    source = source_label(args)
    with refuse_unreadable(source, "read files of your own with --data_files" if args.hub else "give undamaged files"):
        if args.hub:
            name, _, revision = args.hub.partition("@")
            note_moving("--hub", name, revision)
            rows = load_dataset(name, revision=revision or None, split="train", streaming=True)
        else:
            files = [glob.escape(str(path)) for path in args.data_files]
            rows = load_dataset(file_format(args.data_files[0]), data_files=files, split="train", streaming=True)
        for batch in rows.iter(batch_size=LINES):
            if args.column not in batch:
                raise UserError(f"{source} has no column {args.column!r}, but {', '.join(batch)}: choose one with --column")
            texts = ["" if text is None else text for text in batch[args.column]]
            if others := [text for text in texts if not isinstance(text, str)]:
                raise UserError(f"{source} has {others[0]!r} in the column {args.column!r}, not a text: choose another with --column")
            yield texts


def tokenize(texts: Iterable[list[str]], tokenizer) -> Iterator[np.ndarray]:
    """Yield the pieces of the texts, uint16; any number of empty lines between two documents becomes one separator."""
    separated = True  # no separator before the first document
    for batch in texts:
        full = [text for text in batch if text.strip()]
        ids = tokenizer(full, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True)["input_ids"] if full else []
        encoded, joined = iter(ids), []
        for text in batch:
            if text.strip():
                joined += next(encoded)
                separated = False
            elif not separated:
                joined.append(tokenizer.sep_token_id)
                separated = True
        yield np.array(joined, np.uint16)


def write_pieces(path: Path, chunks: Iterable[np.ndarray], limit: int | None) -> int:
    """Write at most `limit` pieces and return their number."""
    count = 0
    with naming(path), open(path, "wb") as file:
        for chunk in chunks:
            if limit is not None:
                chunk = chunk[: limit - count]
            file.write(chunk.astype("<u2").tobytes())
            if count // 1_000_000 != (count + len(chunk)) // 1_000_000:
                require_space(path.parent, 0)
                log(f"{count + len(chunk):,} pieces")
            count += len(chunk)
            if count == limit:
                break
    return count


def save_tokenizer(tokenizer, folder: Path) -> list[str]:
    """Save the tokenizer beside its pieces, down to the disk, and return the names of its files."""
    try:
        with naming(folder / TOKENIZER):
            tokenizer.save_pretrained(folder / TOKENIZER)
    except OSError:
        raise
    except Exception as error:  # that of a full disk is of no kind of its own
        raise OSError(errno.EIO, " ".join(str(error).split())[:300], str(folder / TOKENIZER)) from error
    files = files_below(folder, TOKENIZER)
    for path in [*(folder / name for name in files), folder / TOKENIZER]:
        sync(path)
    return files


class PieceText(TextDataset):
    """The word pieces of --data_files or of a dataset on the hub, with their tokenizer."""

    unit = "pieces"

    def settings(self) -> dict[str, Any]:
        args = self.args
        return {"source": source_label(args), "limit": args.limit, "column": args.column, "tokenizer": label_of(args.tokenizer)}

    def build(self, folder: Path) -> list[str]:
        args, source = self.args, source_label(self.args)
        tokenizer, whole = load_tokenizer(args.tokenizer), folder / "whole"
        count = write_pieces(whole, tokenize(read_texts(args), tokenizer), args.limit)
        if count < LEAST_PIECES:
            raise UserError(f"{source} has {count:,} pieces: give at least {LEAST_PIECES:,}")
        splits = self.split(whole, count // HELD_OUT)
        files = save_tokenizer(tokenizer, folder)
        meta = {
            "title": args.title or (f"{self.name}, first {count:,} pieces" if args.limit else self.name),
            "source": source,
            "limit": args.limit,
            "column": args.column,
            "official_text": False,
            "splits": splits,
            "vocabulary": msgspec.structs.asdict(vocabulary_of(tokenizer, args.tokenizer)),
            "files": {name: content_of(folder / name) for name in files},
        }
        return self.write_meta(folder, meta)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises UserError for values that cannot be used."""
    parser = Parser(description="Prepare word pieces for masked language modelling and print their folder.")
    parser.add_argument("name", metavar="NAME", help="name of the dataset, best with that of the tokenizer in it")
    parser.add_argument("--tokenizer", required=True, help="folder with vocab.txt, or vocab.json and merges.txt, or a name on the hub")
    files_help = "texts (plain, .xz, .gz), .parquet, .jsonl or .csv"
    parser.add_argument("--data_files", type=Path, nargs="+", metavar="FILE", default=[], help=files_help)
    parser.add_argument("--hub", metavar="DATASET[@REVISION]", help="dataset on the hub, in place of --data_files")
    parser.add_argument("--column", default="text", help="column with the texts (default: text)")
    parser.add_argument("--limit", type=count, metavar="N", help="take the first N pieces only")
    parser.add_argument("--title", help="name of the text in tables (default: NAME)")
    parser.add_common("NAME", verify=True)
    args = parser.parse_args(argv)
    if bool(args.hub) == bool(args.data_files):
        raise UserError("give the text either with --data_files FILE... or with --hub DATASET")
    if args.limit is not None and args.limit < LEAST_PIECES:
        raise UserError(f"--limit {args.limit} is too small: take at least {LEAST_PIECES:,} pieces")
    for path in args.data_files:
        if not path.is_file():
            raise UserError(f"--data_files {path} is not a file: give texts, .parquet, .jsonl or .csv files")
        if file_format(path) != file_format(args.data_files[0]):
            raise UserError(f"--data_files {args.data_files[0]} and {path} have different formats: give files of one format")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command: see the module's docstring."""
    print(PieceText(parse(argv), DATA_DIR).prepare())
    return 0


if __name__ == "__main__":
    run_main(main)
