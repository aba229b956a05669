"""Puts the labelled data of a task into a folder, as utils.data.rows reads it (see data/README.md).

    python data/prepare_task.py sst2                        # sst2 and csqa: from the hub
    python data/prepare_task.py svamp                       # asdiv_a, mawps and svamp: from github.com/arkilpatel/SVAMP
    python data/prepare_task.py sst2 --source ~/glue/SST-2  # files you have

The last line on stdout is the folder, everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DATA_DIR = Path(__file__).resolve().parent
sys.path[:0] = [str(folder) for folder in (DATA_DIR.parent, DATA_DIR) if str(folder) not in sys.path]

from prepare import require_space, shown, sync_folder, write_synced  # noqa: E402

from utils.data.corpus import digest_of, read_chunks  # noqa: E402
from utils.data.download import Unavailable, download, log  # noqa: E402
from utils.data.rows import KINDS, TASKS, Examples, read_examples  # noqa: E402
from utils.errors import UserError, run_main  # noqa: E402

SVAMP = "https://raw.githubusercontent.com/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/data"
SPLITS = ("train", "validation")  # on the hub


class Download(NamedTuple):
    """A task's files below `url`, with the sha256 of each."""

    url: str
    sha256: dict[str, str]


class Hub(NamedTuple):
    """A task's data set on the hub. line: a row as a line of the task's files, which begin with `header`."""

    name: str
    config: str | None
    columns: tuple[str, ...]
    header: str
    line: Callable[[dict[str, Any]], str]


def line_of_csqa(row: dict[str, Any]) -> str:
    """As in the published files, byte for byte."""
    choices = [{"label": label, "text": text} for label, text in zip(row["choices"]["label"], row["choices"]["text"], strict=True)]
    question = {"question_concept": row["question_concept"], "choices": choices, "stem": row["question"]}
    return json.dumps({"answerKey": row["answerKey"], "id": row["id"], "question": question})


HUB = {
    "sst2": Hub("nyu-mll/glue", "sst2", ("sentence", "label"), "sentence\tlabel\n", lambda row: f"{row['sentence']}\t{row['label']}"),
    "csqa": Hub("tau/commonsense_qa", None, ("id", "question", "question_concept", "choices", "answerKey"), "", line_of_csqa),
}

DOWNLOADS = {
    "asdiv_a": Download(
        f"{SVAMP}/cv_asdiv-a",
        {
            "fold0/train.csv": "5c711c9150712141bfde68abf5ee4aecb610563325901320aef41e1e5ecf6c84",
            "fold0/dev.csv": "0813a90f336147b1229a6d1d133c29f7e585cb27cafd651976bb94449a4b81c0",
            "fold1/train.csv": "77046a465a3e693b4b241dcbce2fe2cba7c9d3d253201e5e125273f6f95ade8a",
            "fold1/dev.csv": "2432c24452fceb43c76f081342ebcd0e7b0f5776cb2908e621eeb4e2fad3cd17",
            "fold2/train.csv": "25a7e1b542fb6c39181ab6005ec9e1eb68d049f0ca4367c87837d299feef3cd8",
            "fold2/dev.csv": "63da38010296031a123c0bd9cb80701870f1e31fdf06a88442b3ab6500b36b84",
            "fold3/train.csv": "618e38871a3b82b184f47c301cae011b16ba1d0d2062017e51899490d071d846",
            "fold3/dev.csv": "7a45f3d18353e4ea8ffa2d1cb238e80068ad3bb5dbed4303231b3af0836d78e2",
            "fold4/train.csv": "caf82cc29dafe77dda0aac8bf8af5c363c666e0e1480fbaedc47c504384b76fa",
            "fold4/dev.csv": "b9fe1aacddc34ec2caed5e0c35faff2681198431b021d13e16dc2e7c61ec6ecb",
        },
    ),
    "mawps": Download(
        f"{SVAMP}/cv_mawps",
        {
            "fold0/train.csv": "0674253e6099813cefbb1d6eae3d2dc784ab6ebfdaf8755f6ebb4b99fc1f6ebe",
            "fold0/dev.csv": "bad59cff796b01a87363ea970f1fa80c15f56ff5f4388143aadbdc3feaf5f990",
            "fold1/train.csv": "ad8846861202060f2dfcb8423d23218cbf6a4a67010d4d4d939b9df61b2d34b0",
            "fold1/dev.csv": "31362cb8741f9fc11b470b224478902ae27ab762bdd82bcb08a9c945d5947422",
            "fold2/train.csv": "b137a07367e1b3cd9556fae7b9e17fb5e23836e1e6dc9357719049ebc8860c62",
            "fold2/dev.csv": "fae4f08a24a23123612ca5bb960e4f9aa7202c856344a59ab7adea424dfc670d",
            "fold3/train.csv": "fb1e286a94feed24a41c5560095e21a33d61888c7c27a355e6ccef725deaf084",
            "fold3/dev.csv": "5ac76e5559cdde0aa8bcac77eb9af46b9b0230f00661ad0257dbd58a1567a323",
            "fold4/train.csv": "9194364265a42e0f146cc73f514c806c5d322827cd025a474ded33af076837bb",
            "fold4/dev.csv": "1bb9164e6ba93fdc1bffddd8544c20cddc3c195a299b0b6c6893c2a760c3434b",
        },
    ),
    "svamp": Download(
        f"{SVAMP}/mawps-asdiv-a_svamp",
        {
            "train.csv": "c761cdc6390a67a285c6c346a2931f61bc8f47430eceaeb123cc3d0263efa821",
            "dev.csv": "978425fa0820a147a20d3cb305a571d77b8ba0d1ccec4a96dd1470bf0079c338",
        },
    ),
}


def names_of(task: str) -> list[str]:
    """All files of a task, of every fold."""
    return [name for fold in range(KINDS[task].folds) for name in KINDS[task].files(fold)]


def sha256_of(path: Path) -> str:
    return digest_of(read_chunks(path), "sha256")[1]


def by_hand(task: str) -> str:
    to_last = f", and so on to fold{KINDS[task].folds - 1}" if KINDS[task].folds > 1 else ""
    return f"--source DIR takes a folder with {' and '.join(KINDS[task].files(0))}{to_last}"


# where the files are from


def copy_files(job: argparse.Namespace, folder: Path) -> str:
    """Copies the files of --source; returns where they are from."""
    require_space(folder, sum((job.source / name).stat().st_size for name in names_of(job.task)))
    for name in names_of(job.task):
        write_synced(folder / name, read_chunks(job.source / name))
    return str(job.source)


def download_files(task: str, known: Download, folder: Path) -> str:
    """Returns where the files are from. Raises UserError where one cannot be had."""

    def check(path: Path, sha256: str) -> None:
        if (found := sha256_of(path)) != sha256:
            raise UserError(f"{path.stat().st_size:,} bytes with sha256 {found}, not {sha256}")

    require_space(folder, 0)
    try:
        for name, sha256 in known.sha256.items():
            download(f"{known.url}/{name}", folder / name, lambda path, sha256=sha256: check(path, sha256), by_hand(task))
    except Unavailable as error:  # whose part is not kept here: the files are small
        raise UserError(re.sub(r"; [\d,]+ bytes are kept for another try", "", str(error))) from None
    return known.url


def hub_lines(task: str, hub: Hub, split: str) -> Iterator[bytes]:
    """A file of the task, line by line. UserError for a data set that cannot be had, or has other columns."""
    from datasets import load_dataset

    yield hub.header.encode()
    try:
        for row in load_dataset(hub.name, hub.config, split=split, streaming=True):
            if lacking := [column for column in hub.columns if column not in row]:
                raise UserError(f"{hub.name} has the columns {', '.join(row)} and no {', '.join(lacking)}: {by_hand(task)}")
            yield hub.line(row).encode() + b"\n"
    except UserError:
        raise
    except Exception as error:  # of the network, the hub or a parser: many kinds, all about the input
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{hub.name} cannot be read: {reason}; {by_hand(task)}") from error


def write_hub_files(task: str, hub: Hub, folder: Path) -> str:
    """Returns where the files are from."""
    require_space(folder, 0)
    for name, split in zip(KINDS[task].files(0), SPLITS, strict=True):
        log(f"reading {hub.name}, {split}")
        write_synced(folder / name, hub_lines(task, hub, split))
    return hub.name


def fill(job: argparse.Namespace, downloads: dict[str, Download], folder: Path) -> list[str]:
    """Writes all files of the task into the empty folder and returns lines about them. UserError for rows that utils.data.rows refuses and,
    without --source, for other numbers of rows than the published ones.
    """
    for name in names_of(job.task):
        (folder / name).parent.mkdir(exist_ok=True)
    if job.source:
        origin = copy_files(job, folder)
    elif job.task in HUB:
        origin = write_hub_files(job.task, HUB[job.task], folder)
    else:
        origin = download_files(job.task, downloads[job.task], folder)
    try:
        found = read_folds(job.task, folder)
    except UserError as error:  # this folder is about to go
        raise UserError(str(error).replace(str(folder), origin) + ("" if job.source else f"; {by_hand(job.task)}")) from None
    if not job.source and (other := not_published(found)):
        raise UserError(f"{origin} gives {other}: {by_hand(job.task)}")
    for inner in {(folder / name).parent for name in names_of(job.task)} | {folder}:
        sync_folder(inner)
    return [f"prepared {job.out} from {origin}", *map(summary, found)]


def read_folds(task: str, folder: Path) -> list[Examples]:
    """Reads and checks every row of every fold."""
    return [read_examples(task, folder, fold) for fold in range(KINDS[task].folds)]


def not_published(found: list[Examples]) -> str | None:
    """The title of the first fold that has not the published numbers of rows."""
    pairs = zip(found, KINDS[found[0].name].counts, strict=True)
    return next((some.title for some, rows in pairs if (len(some.train), len(some.held_out)) != rows), None)


def summary(found: Examples) -> str:
    notes = f"; {found.notes}" if found.notes else ""
    return f"{found.title}: {len(found.train):,} rows to train on, {len(found.held_out):,} held out ({found.split}){notes}"


# the folder


def install(built: Path, out: Path) -> None:
    """Puts the finished folder at `out`. A reader finds the old files, none or the new ones, never a mixture."""
    old = built.with_suffix(".old")
    try:
        if out.exists():
            os.rename(out, old)
        os.rename(built, out)
        sync_folder(out.parent)
    finally:
        if old.exists() and not out.exists():
            os.rename(old, out)
        shutil.rmtree(old, ignore_errors=True)


def already_there(job: argparse.Namespace, downloads: dict[str, Download]) -> bool:
    """Whether the folder holds what the job asks for, all rows checked; UserError where it holds something else."""
    out, names = job.out, names_of(job.task)
    if not out.exists():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is a file, not a folder: choose another --out, or move it")
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if foreign := sorted(found - set(names)):
        raise UserError(f"{out} holds {foreign[0]}, which is no file of {job.task}: choose another --out, or move it")
    if job.force or not found:
        return False
    remedy = "choose another --out, or replace it with --force"
    for name in names:
        if name not in found:
            raise UserError(f"{out} holds {sorted(found)[0]} but no {name}: {remedy}")
    try:
        other = not_published(read_folds(job.task, out))
    except UserError as error:
        raise UserError(f"{error}; or choose another --out") from None
    if other and not job.source:
        raise UserError(f"{out} holds {other}: {remedy}")
    for name in names:
        wanted = sha256_of(job.source / name) if job.source else downloads[job.task].sha256[name] if job.task in downloads else None
        if wanted and sha256_of(out / name) != wanted:
            raise UserError(f"{out / name} is not the file of {job.source or downloads[job.task].url}: {remedy}")
    return True


def prepare(job: argparse.Namespace, downloads: dict[str, Download]) -> None:
    """Leaves nothing behind when it fails."""
    if already_there(job, downloads):
        log(f"already prepared: {job.out}")
        return
    out = job.out.resolve()  # the place behind a link, so that the folder is built on the same disk
    if out.exists() and Path.cwd().is_relative_to(out):
        raise UserError(f"{out} is the working folder, which cannot be replaced: start the program from another")
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    building.mkdir()
    try:
        lines = fill(job, downloads, building)
        install(building, out)
    except OSError:
        if not already_there(job, downloads):  # else another process was faster, with the same
            raise
        lines = [f"already prepared: {job.out}"]
    finally:
        shutil.rmtree(building, ignore_errors=True)
    log("\n".join(lines))


# the command


def parse(argv: list[str] | None, data_dir: Path) -> argparse.Namespace:
    """The command line; UserError for what is wrong in itself."""
    parser = argparse.ArgumentParser(description="Prepare the labelled data of a task; prints the prepared folder.")
    parser.add_argument("task", metavar="TASK", choices=TASKS, help=", ".join(TASKS))
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--source", type=Path, metavar="DIR", help="a folder that has the files (default: from the network)")
    where.add_argument("--hub", action="store_true", help="from the hub: what sst2 and csqa do without --source")
    parser.add_argument("--out", type=Path, help="folder to write (default: TASK in the folder of this program)")
    parser.add_argument("--force", action="store_true", help="replace the files in a folder that holds others")
    job = parser.parse_args(argv)
    job.out = job.out or shown(data_dir / job.task)
    if job.hub and job.task not in HUB:
        raise UserError(f"--hub has {' and '.join(HUB)}: leave it out, {job.task} is downloaded from github.com/arkilpatel/SVAMP")
    for name in names_of(job.task) if job.source else ():
        if not (job.source / name).is_file():
            raise UserError(f"--source {job.source} has no {name}: {by_hand(job.task)}")
    return job


def main(argv: list[str] | None = None, downloads: dict[str, Download] = DOWNLOADS, data_dir: Path = DATA_DIR) -> int:
    """The command; `downloads` and `data_dir` let tests use their own address and folder."""
    job = parse(argv, data_dir)
    try:
        prepare(job, downloads)
    except OSError as error:
        raise UserError(f"{error.filename or job.out}: {error.strerror or error}") from None
    print(job.out)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that an unfinished folder is removed
    run_main(main)
