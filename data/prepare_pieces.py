"""Prepares a text for BERT or RoBERTa: word pieces as train.bin, valid.bin, test.bin, meta.json, and the tokenizer (see data/README.md).

    python data/prepare_pieces.py books-bert-base-uncased --tokenizer bert-base-uncased --data_files a.txt b.txt.xz
    python data/prepare_pieces.py bookcorpus-roberta-base --tokenizer roberta-base --hub bookcorpus/bookcorpus@refs/convert/parquet

The last line on stdout is the folder, everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
DATA_DIR = Path(__file__).resolve().parent
sys.path[:0] = [str(folder) for folder in (DATA_DIR.parent, DATA_DIR) if str(folder) not in sys.path]

import numpy as np  # noqa: E402
from prepare import folder_name, require_space, shown, sync_folder, write_synced  # noqa: E402

from utils.data.corpus import CHUNK, META, SCHEMA, SPLITS, Corpus, digest_of, read_chunks, split_file  # noqa: E402
from utils.data.download import log  # noqa: E402
from utils.data.tokenizer import load_tokenizer, vocabulary_of  # noqa: E402
from utils.errors import UserError, run_main  # noqa: E402

BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}  # anything else is text, a paragraph per line
HELD_OUT = 100  # one in so many pieces is for validation, and as many for the test
LINES = 1000  # tokenized at once
LEAST_PIECES = 1000


def lines(job: argparse.Namespace) -> Iterator[list[str]]:
    """The texts in order, some at a time. UserError for a file or data set that cannot be had, or has no column of texts."""
    from datasets import load_dataset

    try:
        if job.hub:
            name, _, revision = job.hub.partition("@")
            rows = load_dataset(name, revision=revision or None, split="train", streaming=True)
        else:
            files = [glob.escape(str(path)) for path in job.data_files]
            rows = load_dataset(kind_of(job.data_files[0]), data_files=files, split="train", streaming=True)
        for batch in rows.iter(batch_size=LINES):
            if job.column not in batch:
                raise UserError(f"{source(job)} has no column {job.column!r}, but {', '.join(batch)}: name one with --column")
            texts = ["" if text is None else text for text in batch[job.column]]
            if others := [text for text in texts if not isinstance(text, str)]:
                raise UserError(
                    f"{source(job)}: the column {job.column!r} holds {others[0]!r}, which is no text: name another with --column"
                )
            yield texts
    except UserError:
        raise
    except Exception as error:  # of the network, the hub, a decompressor or a parser: many kinds, all about the input
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        remedy = "--data_files reads files of your own" if job.hub else "give sound files"
        raise UserError(f"{source(job)} cannot be read: {reason}; {remedy}") from error


def kind_of(path: Path) -> str:
    """How `datasets` calls the file's format."""
    return BUILDERS.get(Path(path.name.lower().removesuffix(".xz").removesuffix(".gz")).suffix, "text")


def source(job: argparse.Namespace) -> str:
    return job.hub or " + ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in job.data_files)


def pieces(texts: Iterable[list[str]], tokenizer) -> Iterator[np.ndarray]:
    """The text's pieces, uint16; an empty line, which parts documents, becomes one separator."""
    apart = True  # nothing stands before the first document
    for some in texts:
        full = [text for text in some if text.strip()]
        ids = tokenizer(full, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True)["input_ids"] if full else []
        found, joined = iter(ids), []
        for text in some:
            if text.strip():
                joined += next(found)
                apart = False
            elif not apart:
                joined.append(tokenizer.sep_token_id)
                apart = True
        yield np.array(joined, np.uint16)


def write_pieces(path: Path, chunks: Iterable[np.ndarray], limit: int | None) -> int:
    """How many there are, at most `limit`."""
    count = 0
    with open(path, "wb") as file:
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


def write_split(whole: np.ndarray, path: Path) -> dict[str, Any]:
    step = CHUNK // 2
    write_synced(path, (whole[start : start + step].tobytes() for start in range(0, len(whole), step)))
    size, digest = digest_of(read_chunks(path), "sha256")
    return {"bytes": size, "sha256": digest}


def build(job: argparse.Namespace, folder: Path) -> None:
    """Writes everything into the empty folder, meta.json last."""
    tokenizer = load_tokenizer(job.tokenizer)
    count = write_pieces(folder / "whole", pieces(lines(job), tokenizer), job.limit)
    if count < LEAST_PIECES:
        raise UserError(f"{source(job)} gives {count:,} pieces: at least {LEAST_PIECES:,} are needed")
    require_space(folder, 2 * count)
    whole, held = np.memmap(folder / "whole", dtype="<u2", mode="r"), count // HELD_OUT
    ends = {"train": (0, count - 2 * held), "valid": (count - 2 * held, count - held), "test": (count - held, count)}
    entries = {split: write_split(whole[slice(*ends[split])], split_file(folder, split)) for split in SPLITS}
    del whole
    (folder / "whole").unlink()
    tokenizer.save_pretrained(folder / "tokenizer")
    title = job.title or (f"{job.name}, first {count:,} pieces" if job.limit else job.name)
    meta = {
        "schema": SCHEMA,
        "name": job.name,
        "title": title,
        "source": source(job),
        "limit": job.limit,
        "column": job.column,
        "official_text": False,
    }
    meta |= {"splits": entries, "vocabulary": asdict(vocabulary_of(tokenizer, job.tokenizer))}
    write_synced(folder / META, [(json.dumps(meta, indent=1) + "\n").encode()])
    sync_folder(folder)


def already_there(job: argparse.Namespace) -> bool:
    """Whether the folder is what the job asks for; UserError where it holds something else."""
    if not job.out.exists():
        return False
    if not (job.out / META).exists():
        raise UserError(f"{job.out} is there and no prepared text: choose another --out, or move it")
    if job.force:
        return False
    meta = Corpus.open(job.out).meta
    wanted = {"name": job.name, "source": source(job), "limit": job.limit, "column": job.column, "tokenizer": Path(job.tokenizer).name}
    wanted |= {"title": job.title} if job.title else {}
    found = {**meta, "tokenizer": meta.get("vocabulary", {}).get("name")}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(f"{job.out} has {key} {found.get(key)!r}, not {value!r}: choose another --out, or replace it with --force")
    return True


def prepare(job: argparse.Namespace) -> None:
    """Leaves nothing behind when it fails."""
    building = job.out.parent / f".{job.out.name}.{uuid.uuid4().hex[:8]}.tmp"
    building.mkdir(parents=True)
    try:
        build(job, building)
        install(building, job.out)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def install(built: Path, out: Path) -> None:
    """Puts the finished folder at `out`: one rename or, where a folder is, name by name with meta.json first gone and last back."""
    if out.exists():
        (out / META).unlink()
        sync_folder(out)
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        for name in ("tokenizer", *(split_file(out, split).name for split in SPLITS), META):
            os.replace(built / name, out / name)
        sync_folder(out)
    else:
        os.rename(built, out)
    sync_folder(out.parent)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; UserError for what is wrong in itself."""
    parser = argparse.ArgumentParser(description="Prepare word pieces for masked language modelling; prints the prepared folder.")
    parser.add_argument("name", metavar="NAME", help="the data set's name, best with the tokenizer's in it")
    parser.add_argument("--tokenizer", required=True, help="a folder with vocab.txt, or vocab.json and merges.txt, or a name on the hub")
    parser.add_argument(
        "--data_files", type=Path, nargs="+", metavar="FILE", default=[], help="texts (plain, .xz, .gz), .parquet, .jsonl, .csv"
    )
    parser.add_argument("--hub", metavar="DATASET[@REVISION]", help="a data set on the hub, in place of --data_files")
    parser.add_argument("--column", default="text", help="the column of texts (default: text)")
    parser.add_argument("--limit", type=int, metavar="N", help="take the first N pieces only")
    parser.add_argument("--out", type=Path, help="folder to write (default: NAME in the folder of this program)")
    parser.add_argument("--title", help="the text's name in tables (default: NAME)")
    parser.add_argument("--force", action="store_true", help="replace a folder that holds something else")
    job = parser.parse_args(argv)
    job.name, job.out = folder_name(job.name), job.out or shown(DATA_DIR / job.name)
    if bool(job.hub) == bool(job.data_files):
        raise UserError("give the text either by --data_files FILE... or by --hub DATASET")
    if job.limit is not None and job.limit < LEAST_PIECES:
        raise UserError(f"--limit {job.limit} is too few: at least {LEAST_PIECES:,} pieces are needed")
    for path in job.data_files:
        if not path.is_file():
            raise UserError(f"--data_files {path} is not a file")
        if kind_of(path) != kind_of(job.data_files[0]):
            raise UserError(f"--data_files {job.data_files[0]} and {path} are of two kinds: give files of one")
    return job


def main(argv: list[str] | None = None) -> int:
    """The command: see the module's docstring."""
    job = parse(argv)
    if already_there(job):
        log(f"already prepared: {job.out}")
    else:
        try:
            prepare(job)
        except OSError as error:
            raise UserError(f"{error.filename or job.out}: {error.strerror or error}") from None
        log(f"prepared {job.out} from {Corpus.open(job.out).meta['source']}")
    print(job.out)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that an unfinished folder is removed
    run_main(main)
