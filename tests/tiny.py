"""Runs of train.py and finetune.py that take about a second: a small text, small flags, and processes forked from one with torch in it."""

import gc
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from utils import documents

ROOT = Path(__file__).resolve().parent.parent
WORDS = (
    "the",
    "frozen",
    "router",
    "sends",
    "each",
    "token",
    "to",
    "more",
    "experts",
    "while",
    "training",
    "of",
    "a",
    "model",
    "goes",
    "on",
)
TINY = {  # a run of two layers; what belongs to a method is left to it
    **{"n_layer": 2, "n_head": 2, "d_head": 8, "d_model": 32, "d_ff": 64, "moe_num_expert": 4, "dropout": 0.1},
    **{"tgt_len": 8, "mem_len": 8, "eval_tgt_len": 8, "batch_size": 4, "eval_batch_size": 2, "lr": 3e-3, "scheduler": "cosine"},
    **{"max_step": 24, "log_interval": 4, "eval_interval": 8, "device": "cpu", "threads": 1, "preset": "quick", "yes": True},
}
ENCODER = {  # over them, a run of bert or roberta: without what only Transformer-XL knows
    **{"d_head": None, "mem_len": None, "eval_tgt_len": None},
    **{"d_model": 16, "d_ff": 32, "tgt_len": 10, "max_step": 20},
}
VOCABULARY = {"name": "tiny", "size": 40, "sha256": "0" * 64}  # pieces of words are 5 to 38
SPECIAL = {"bert": {"pad": 0, "cls": 2, "sep": 3, "mask": 4}, "roberta": {"cls": 0, "pad": 1, "sep": 2, "mask": 39}}
VOLATILE = ("seconds", "tokens_per_second")


class Place(NamedTuple):
    """As much of an engine as a task asks for."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"


ALONE = Place()


def write_corpus(folder: Path, train_bytes: int = 20_000, held_out_bytes: int = 100) -> Path:
    """A prepared text of words from a small vocabulary; returns its folder."""
    draw = random.Random(0)
    text = " ".join(draw.choice(WORDS) for _ in range(train_bytes)).encode()
    places = {
        "train": slice(0, train_bytes),
        "valid": slice(train_bytes, train_bytes + held_out_bytes),
        "test": slice(-held_out_bytes, None),
    }
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for split, place in places.items():
        (folder / f"{split}.bin").write_bytes(text[place])
        entries[split] = {"bytes": len(text[place]), "sha256": hashlib.sha256(text[place]).hexdigest()}
    meta = {"schema": 1, "name": "words", "title": "Words", "source": "tests", "official_text": False, "splits": entries, "symbols": 27}
    documents.write(folder / "meta.json", meta)
    return folder


def change_meta(folder: Path, **changes: object) -> None:
    """Writes the meta.json of a prepared text anew, as if it had been prepared in this way."""
    content = {name: value for name, value in read_json(folder / "meta.json").items() if name not in documents.MARKS}
    documents.write(folder / "meta.json", content | changes)


def write_pieces(folder: Path, model: str = "bert", train: int = 485, held_out: int = 59, run: int = 8) -> Path:
    """A prepared text of word pieces with the special ones of the model's tokenizer; each piece stands `run` times in a row."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for split, count in {"train": train, "valid": held_out, "test": held_out}.items():
        pieces = [piece for _ in range(count // run + 1) for piece in [draw.randrange(5, 39)] * run]
        content = array("H", pieces[:count]).tobytes()
        (folder / f"{split}.bin").write_bytes(content)
        entries[split] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    meta = {"schema": 1, "name": "pieces", "title": f"Pieces, {model}", "source": "tests", "official_text": False, "splits": entries}
    documents.write(folder / "meta.json", meta | {"vocabulary": VOCABULARY | SPECIAL[model]})
    return folder


def write_rows(folder: Path, task: str, train: int = 30, held_out: int = 11) -> Path:
    """The files of a fine-tuning task, with rows of many lengths; what is asked for stands in the text. Returns their folder."""
    draw = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)

    def words() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 9)))

    def sentence() -> str:
        label = draw.randrange(2)
        return f"{words()} {('bad', 'good')[label]}\t{label}"

    def question() -> str:
        answer, others = draw.randrange(5), draw.sample(WORDS, 5)
        choices = [{"label": letter, "text": "it" if i == answer else others[i]} for i, letter in enumerate("ABCDE")]
        return json.dumps({"answerKey": "ABCDE"[answer], "question": {"stem": words(), "choices": choices}})

    def problem() -> str:
        a, b, plus = draw.randint(10, 99), draw.randint(1, 9), draw.randrange(2)
        text = f"{words()} number0 {('less', 'more')[plus]} number1"
        return f"{text},{a}.0 {b}.0,{'-+'[plus]} number0 number1,{a + b if plus else a - b}.0"

    names, header, row = {
        "sst2": (("train.tsv", "dev.tsv"), "sentence\tlabel\n", sentence),
        "csqa": (("train_rand_split.jsonl", "dev_rand_split.jsonl"), "", question),
    }.get(task, (("train.csv", "dev.csv"), "Question,Numbers,Equation,Answer\n", problem))
    for fold in range(5) if task in ("asdiv_a", "mawps") else [None]:
        where = folder if fold is None else folder / f"fold{fold}"
        where.mkdir(exist_ok=True)
        for name, count in zip(names, (train, held_out), strict=True):
            (where / name).write_text(header + "".join(f"{row()}\n" for _ in range(count)))
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A BERT tokenizer whose pieces are the words of the rows, and letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [f"{before}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789" for before in ("", "##")]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *WORDS[:6]]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)) + "\n")
    return folder


def flags(data: Path, work_dir: Path, **changes: object) -> list[str]:
    """The command line of a tiny run; a value True stands for a switch, None leaves a flag out."""
    values = {**TINY, "data": data, "work_dir": work_dir, **changes}
    words = []
    for name, value in values.items():
        words += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def parse(argv: list[str]):
    """The decided flags of a command line of train.py."""
    from utils.cli import train

    return train.parse(argv)[0]


@dataclass
class Finished:
    """How a run ended: exit code (negative: the signal that killed it), and its output."""

    code: int
    out: str
    err: str
    out_bytes: bytes = b""


class Running:
    """A program in a process of its own, as `python train.py <arguments>` would be, but without the seconds that importing torch takes.

    program: a file of the repository, or "-m" and a module.
    """

    def __init__(self, arguments: list[str], before: Callable[[], None] | None = None, program: str = "train.py"):
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        self.process = _server().Process(target=_run, args=(program, arguments, str(self._out), str(self._err), before))
        self.process.start()

    @property
    def out(self) -> str:
        return self._out.read_text(errors="replace") if self._out.exists() else ""

    def wait_until(self, condition: Callable[[], bool], timeout: float = 60.0) -> None:
        """Returns as soon as the condition holds or the run has ended."""
        end = time.monotonic() + timeout
        while self.process.is_alive() and not condition():
            assert time.monotonic() < end, f"nothing happened within {timeout} s: {self.out}"
            time.sleep(0.002)

    def send(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def finish(self, timeout: float = 60.0) -> Finished:
        self.process.join(timeout)
        hung = self.process.is_alive()
        if hung:
            self.process.kill()
            self.process.join()
        out_bytes = self._out.read_bytes() if self._out.exists() else b""
        finished = Finished(self.process.exitcode, self.out, self._err.read_text() if self._err.exists() else "", out_bytes)
        assert not hung, f"no end within {timeout} s: {finished}"
        return finished


def run(arguments: list[str], before: Callable[[], None] | None = None, timeout: float = 60.0, program: str = "train.py") -> Finished:
    return Running(arguments, before, program).finish(timeout)


def call(function: Callable[..., None], *arguments: object, timeout: float = 120.0) -> None:
    """Run a function of a module in a process of its own, which shares no state with this one. Fails if the function raises."""
    with tempfile.TemporaryDirectory() as folder:
        process = _server().Process(target=_call, args=(function, arguments, f"{folder}/errors"))
        process.start()
        process.join(timeout)
        if hung := process.is_alive():
            process.kill()
            process.join()
        assert not hung and process.exitcode == 0, Path(folder, "errors").read_text() or f"no end within {timeout} s"


def _call(function: Callable[..., None], arguments: tuple, errors: str) -> None:
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    import torch

    torch.set_num_threads(1)
    function(*arguments)


def completed(arguments: list[str], before: Callable[[], None] | None = None, program: str = "train.py") -> Finished:
    """A run that must succeed."""
    finished = run(arguments, before, program=program)
    assert finished.code == 0, finished.err[-3000:] + finished.out[-2000:]
    return finished


@cache
def _server():
    """Starts the process that all runs are forked from: it has imported everything, and has run nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "pytest",
            "train",
            "utils.cli.train",
            "utils.cli.finetune",
            "utils.models.transformer_xl",
            "utils.tasks.language_modelling",
            "smoe_dropout.hosts.torch_layers",
            "torch.utils.tensorboard",
            "torch._dynamo",
            "torch.distributed.tensor",
            "utils.models.roberta",
            "utils.training.setup",
            "tests.tiny",
        ]
    )
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    try:
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def _run(program: str, arguments: list[str], out: str, err: str, before: Callable[[], None] | None) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    gc.freeze()  # the search for garbage at a run's end passes over what was imported before it
    sys.argv = [str(ROOT / program), *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if before is not None:
            before()
        if program.startswith("-m "):
            runpy.run_module(program.removeprefix("-m "), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)


def read_json(path: Path):
    """The content of a JSON file, sealed or not."""
    found = json.loads(path.read_text())
    return {name: value for name, value in found.items() if name not in ("format", "sha256")} if isinstance(found, dict) else found


def metrics(work_dir: Path, split: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl but for what measures time."""
    lines = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines if split in (None, line["split"])]


def checkpoints(work_dir: Path) -> list[Path]:
    return sorted((work_dir / "checkpoints").glob("step-*"))


def quality(result: dict) -> list[dict]:
    """The rows of result.json or eval.json without speeds."""
    return [{name: value for name, value in row.items() if name not in VOLATILE} for row in result["quality"]]


def same_run(one: Path, other: Path) -> None:
    """Asserts that two runs recorded the same numbers and have bit for bit the same weights, optimiser, memory and random state.

    A run that was stopped by a signal may have one checkpoint the other has not; the last and the best must be there in both.
    """
    assert metrics(one) == metrics(other)
    results = [read_json(folder / "result.json") for folder in (one, other)]
    assert quality(results[0]) == quality(results[1]) and results[0]["best_step"] == results[1]["best_step"]
    assert results[0]["curve"] == results[1]["curve"]
    for name in ("steps", "tokens", "flops"):
        assert results[0]["training"][name] == results[1]["training"][name]
    for step in {results[0]["best_step"], results[0]["training"]["steps"]}:
        ours, theirs = (folder / "checkpoints" / f"step-{step:08d}" for folder in (one, other))
        assert {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}
        for path in ours.glob("*.safetensors"):
            assert path.read_bytes() == (theirs / path.name).read_bytes(), path
