"""Examines what the experts and routers of a model do on a text: python -m utils.microscope PATH --out FOLDER

PATH: a finished run of train.py, whose last checkpoint is examined on its validation text and compared with the earlier ones, or a
folder of transformers with experts, with --data TEXT. The folder gets microscope.html, a page without anything from elsewhere, and
microscope.json, its numbers. docs/microscope.md defines each.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from smoe_dropout.files import read_object
from smoe_dropout.options import ConfigError
from utils import documents
from utils.errors import Parser, TrainingError, UserError, refuse_unwritable, run_main
from utils.flags.models import MODELS
from utils.reporting.microscope_record import PAGE, RECORD
from utils.training.finished import Finished, open_finished

SIZE = 4 << 20  # bytes of a large page and record


def main(argv: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = Parser(prog="python -m utils.microscope", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("path", type=Path, metavar="PATH", help="finished run of train.py, or folder of a transformers model with experts")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help=f"folder to write {PAGE} and {RECORD} into")
    parser.add_argument("--data", metavar="FILE", help="UTF-8 text, also .xz, for a transformers model")
    parser.add_argument("--k", type=_count, metavar="K", help="active experts. Default: E/2 of a run, the model's own k of a folder")
    parser.add_argument("--tokens", type=_count, default=16_384, metavar="N", help="positions to read, at least. Default: 16384")
    parser.add_argument(
        "--length", type=_count, default=512, metavar="N", help="tokens of a transformers model read at a time. Default: 512"
    )
    args = parser.parse_args(argv)
    run = _opened(args)
    here = {path.name for path in args.out.iterdir()} if args.out.is_dir() else set()
    if foreign := sorted(name for name in here if name.removeprefix(".").removesuffix(".partial") not in (PAGE, RECORD)):
        raise UserError(f"--out {args.out} holds something else, such as {foreign[0]}: choose an empty or a new folder")
    refuse_unwritable("--out", args.out)
    documents.require_space(next(folder for folder in (args.out, *args.out.absolute().parents) if folder.is_dir()), SIZE)

    from utils.reporting.microscope_page import render  # here, because they import torch and matplotlib
    from utils.training.examination import examine_folder, examine_run

    if run is None:
        content = examine_folder(args.path, args.data, args.k, args.tokens, max(args.length, 2))
    else:
        content = examine_run(run, args.k, args.tokens)
    content = json.loads(json.dumps(documents.finite(content)))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        documents.replace(args.out / PAGE, render(content))
        documents.write(args.out / RECORD, content | {"page": documents.content_of(args.out / PAGE)})
    except OSError as error:
        raise TrainingError(f"{args.out} cannot be written ({error.strerror}): fix that, and run the same command again") from None
    for sentence in content["findings"] or ["no dead experts, no equal experts, no collapsed router"]:
        print(sentence)
    print(f"done: {args.out / PAGE}")


def _count(word: str) -> int:
    if not word.isascii() or not word.isdigit() or not 1 <= int(word[:20]) < 2**31:
        raise argparse.ArgumentTypeError(f"{word[:80]!r} must be a whole number from 1")
    return int(word)


def _opened(args: Any) -> Finished | None:
    """The run, or None for a folder of transformers. UserError for anything else, and for flags that do not fit."""
    if not args.path.is_dir():
        raise UserError(f"{args.path} is not a folder: give a finished run of train.py, or a transformers model with experts")
    try:
        transformers = "model_type" in read_object(args.path / "config.json")
    except ConfigError:
        transformers = False
    if transformers:
        if args.data is None or not Path(args.data).is_file():
            raise UserError(f"{args.path} is a transformers model, which needs a text: give a file by --data, not {args.data}")
        return None
    run = open_finished(args.path)
    if args.data is not None:
        raise UserError(f"--data {args.data} is for a transformers model, and {args.path} is a run, which has its own: leave it out")
    if MODELS[run.flags.model].from_folder:
        raise UserError(f"{args.path} is a run of a transformers model: give its folder {args.path / 'model'}, with --data TEXT")
    if not run.record["sparse"]:
        raise UserError(f"{args.path} is a run of a dense model, which has no experts: give one of another method")
    if args.k is not None and args.k > run.flags.moe_num_expert:
        raise UserError(f"--k {args.k} must be at most the {run.flags.moe_num_expert} experts of {args.path}")
    return run


if __name__ == "__main__":
    run_main(main)
