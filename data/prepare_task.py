"""Prepare the labelled data of a fine-tuning task, as utils.data.rows reads it (see data/README.md).

    python data/prepare_task.py sst2                        # sst2 and csqa: from the Hugging Face hub
    python data/prepare_task.py svamp                       # asdiv_a, mawps and svamp: from github.com/arkilpatel/SVAMP
    python data/prepare_task.py sst2 --source ~/glue/SST-2  # from files of your own

The last line of stdout is the folder; everything else goes to stderr.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends the program without a traceback

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

DATA_DIR = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA_DIR.parent))

from data.dataset import REPLACE, Dataset, Parser, read_chunks, refuse_unreadable
from smoe_dropout.manifest import sha256
from utils.data.download import Unavailable, download, log
from utils.data.meta import ROWS as RECORD
from utils.data.meta import SCHEMA
from utils.data.rows import TASKS, Examples, kind_of, read_examples, refuse_changed
from utils.data.sources import ROWS, Files, Hub
from utils.documents import content_of, replace, require_space, sync, write
from utils.errors import UserError, run_main

HUB_SPLITS = ("train", "validation")
LARGEST = 16 << 20  # bytes of a file that is downloaded; the largest published one has 1.2 MB


def file_names(task: str) -> list[str]:
    """Return the files of a task, of every fold."""
    return [name for fold in range(kind_of(task).folds) for name in kind_of(task).files(fold)]


def source_remedy(task: str) -> str:
    further = f", and so on to fold{kind_of(task).folds - 1}" if kind_of(task).folds > 1 else ""
    return f"give a folder with {' and '.join(kind_of(task).files(0))}{further} by --source DIR"


# where the files come from: each function fills `folder` and returns the origin


def copy_files(task: str, source: Path, folder: Path) -> str:
    require_space(folder, sum((source / name).stat().st_size for name in file_names(task)))
    for name in file_names(task):
        replace(folder / name, read_chunks(source / name))
    refuse_changed(task, source, {name: sha256(folder / name) for name in file_names(task)})
    return str(source)


def download_files(task: str, files: Files, folder: Path) -> str:
    def check(path: Path, expected: str) -> None:
        if (found := sha256(path)) != expected:
            raise UserError(f"{path.stat().st_size:,} bytes with sha256 {found}, not {expected}")

    require_space(folder, 0)
    try:
        for name, expected in files.sha256.items():
            download(f"{files.url}/{name}", folder / name, partial(check, expected=expected), source_remedy(task), LARGEST)
    except Unavailable as error:  # the incomplete part goes with the folder
        raise UserError(f"{error.fault}: {source_remedy(task)}") from None
    return files.url


def read_hub(task: str, hub: Hub, split: str) -> Iterator[bytes]:
    """Yield a file of the task line by line. Raises UserError where the dataset cannot be read or has other columns."""
    from datasets import load_dataset

    yield hub.header.encode()
    with refuse_unreadable(hub.name, source_remedy(task)):
        for row in load_dataset(hub.name, hub.config, revision=hub.revision, split=split, streaming=True):
            if missing := [column for column in hub.columns if column not in row]:
                raise UserError(f"{hub.name} has the columns {', '.join(row)} and no {', '.join(missing)}: {source_remedy(task)}")
            yield hub.line(row).encode() + b"\n"


def write_hub_files(task: str, hub: Hub, folder: Path) -> str:
    require_space(folder, 0)
    for name, split in zip(kind_of(task).files(0), HUB_SPLITS, strict=True):
        log(f"reading {hub.name}, {split}")
        replace(folder / name, read_hub(task, hub, split))
    return origin_of(hub)


# the rows


def read_folds(task: str, folder: Path) -> list[Examples]:
    """Read and check every row of every fold."""
    return [read_examples(task, folder, fold) for fold in range(kind_of(task).folds)]


def unpublished(folds: list[Examples]) -> str | None:
    """Return the title of the first fold whose numbers of rows are not the published ones."""
    pairs = zip(folds, kind_of(folds[0].name).counts, strict=True)
    return next((fold.title for fold, counts in pairs if (len(fold.train), len(fold.held_out)) != counts), None)


def summary(fold: Examples) -> str:
    notes = f"; {fold.notes}" if fold.notes else ""
    return f"{fold.title}: {len(fold.train):,} training rows, {len(fold.held_out):,} held out ({fold.split}){notes}"


def origin_of(published: Files | Hub) -> str:
    return f"{published.name}@{published.revision[:8]}" if isinstance(published, Hub) else published.url


class TaskRows(Dataset):
    """The files of a task, of every fold. Rows of a published source must have the published numbers, and files the published sha256."""

    def owns(self, name: str) -> bool:
        return name in (RECORD, *file_names(self.name))

    def check(self, found: list[str]) -> None:
        source, published = self.args.source, ROWS.get(self.name)
        if RECORD not in found:
            log(f"note: {self.out} has no {RECORD}, so that its files cannot be verified: --force prepares them again")
        for name in file_names(self.name):
            if name not in found:
                raise UserError(f"{self.out} holds {found[0]} but no {name}: {REPLACE}")
        try:
            other = unpublished(read_folds(self.name, self.out))
        except UserError as error:
            raise UserError(f"{error}; or choose another --out") from None
        if other and not source:
            raise UserError(f"{self.out} holds {other}: {REPLACE}")
        digests = published.sha256 if published else {}
        for name in file_names(self.name):
            wanted = sha256(source / name) if source else digests.get(name)
            if wanted and sha256(self.out / name) != wanted:
                raise UserError(f"{self.out / name} differs from the file of {source or origin_of(published)}: {REPLACE}")

    def build(self, folder: Path) -> list[str]:
        source, published, remedy = self.args.source, ROWS.get(self.name), source_remedy(self.name)
        for name in file_names(self.name):
            (folder / name).parent.mkdir(exist_ok=True)
        if source:
            origin = copy_files(self.name, source, folder)
        elif isinstance(published, Hub):
            origin = write_hub_files(self.name, published, folder)
        elif published:
            origin = download_files(self.name, published, folder)
        else:
            raise UserError(f"{self.name} has no published source: {remedy}")
        try:
            folds = read_folds(self.name, folder)
        except UserError as error:  # name the origin, since this folder is about to be removed
            raise UserError(str(error).replace(str(folder), origin) + ("" if source else f"; {remedy}")) from None
        if not source and (other := unpublished(folds)):
            raise UserError(f"{origin} holds {other}: {remedy}")
        files = {name: content_of(folder / name) for name in file_names(self.name)}
        for name, expected in () if source else published.sha256.items():
            if files[name]["sha256"] != expected:
                raise UserError(f"{origin}/{name} has sha256 {files[name]['sha256']}, not the published {expected}: {remedy}")
        write(folder / RECORD, {"schema": SCHEMA, "task": self.name, "source": origin, "files": files})
        for inner in {(folder / name).parent for name in file_names(self.name)} | {folder}:
            sync(inner)
        return [f"prepared {self.out} from {origin}", *map(summary, folds)]


# the command


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Raises UserError for values that cannot be used."""
    parser = Parser(description="Prepare the labelled data of a task and print its folder.")
    parser.add_argument("name", metavar="TASK", choices=TASKS, help=", ".join(TASKS))
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--source", type=Path, metavar="DIR", help="folder with the files (default: download them)")
    on_hub = [task for task, published in ROWS.items() if isinstance(published, Hub)]
    where.add_argument("--hub", action="store_true", help=f"read the hub, the default for {' and '.join(on_hub)}")
    parser.add_common("TASK")
    args = parser.parse_args(argv)
    if args.hub and args.name not in on_hub:
        raise UserError(f"--hub has {' and '.join(on_hub)}, not {args.name}: leave it out")
    for name in file_names(args.name) if args.source else ():
        if not (args.source / name).is_file():
            raise UserError(f"--source {args.source} has no {name}: {source_remedy(args.name)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command: see the module's docstring."""
    print(TaskRows(parse(argv), DATA_DIR).prepare())
    return 0


if __name__ == "__main__":
    run_main(main)
