"""The commands of the campaign, and the folders they read: each is made once by its own program, then copied for every try."""

import fcntl
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests import tiny
from tests.faults import programs
from tests.faults.programs import Fault

HOW = "--preset=quick --max_step=8 --eval_interval=4 --save_interval=2 --log_interval=2 --batch_size=4 --eval_batch_size=2 --lr=3e-3 --yes"
HERE = "--device=cpu --threads=1 --seed=1"
SMALL = "--n_layer=2 --n_head=2 --d_model=16 --d_ff=16 --dropout=0.1 --tgt_len=8 --scheduler=cosine"
TEXT = f"train.py {HOW} {HERE} {SMALL} --d_head=8 --mem_len=8 --eval_tgt_len=8 --data=text"
EXPERTS = "--method=smoe_dropout --moe_num_expert=4"
TUNING = f"finetune.py {HOW} {HERE} --task=sst2 --data=sst2 --checkpoint=run --work_dir=tuned"
FURTHER = f"train.py {HOW} {HERE} --max_step=2 --data=text --work_dir=next"
SURGERY = f"surgery.py --from=run {HERE} --tokens=200"
PREPARE = "data/prepare.py words --source source.txt --out text"
ROWS = "data/prepare_task.py sst2 --source rows --out sst2"
PIECES = "data/prepare_pieces.py pieces --tokenizer tokenizer --data_files lines.txt --out pieces"
CONVERT = (
    "convert.py --from=model --data source.txt --num_experts=4 --tokens=64 --held_out=32 --length=12 --threads=1 --device=cpu --seed=1"
)
RECOVER = f"train.py {HOW} {HERE} --model=hf --start_from=converted --method=elastic --teacher=self --tgt_len=8 --data=tokens"
PASSED = "run/checkpoints tuned/checkpoints recovered/checkpoints"  # a damaged checkpoint that is passed over stays
UNREAD = f"{PASSED} run/env.json tuned/env.json run/metrics.jsonl tuned/metrics.jsonl"  # where the result is already there
EXAMINED = "run merged saved/pretrained saved/model text pieces sst2 seen results"
TWINS = {"source.txt": "source2.txt", "lines.txt": "lines2.txt", "rows": "rows2", "--seed=1": "--seed=2"}  # for what another run has
VOLATILE = {
    "argv",
    "seconds",
    "cpu_seconds",
    "tokens_per_second",
    "started",
    "time",
    "peak_memory_mib",
    "commit",
    "transformers",
}  # the last: recorded where it is loaded


class Job(NamedTuple):
    """A command and the entries that must be in its folder: "half:run" is the entry `half` under the name run.
    One with a + is not damaged.

    makes: what it writes, all of which must be right after it succeeded, but for `free`. prints: its stdout is a result.
    """

    line: str
    needs: str
    makes: str = ""
    free: str = ""
    prints: bool = False

    @property
    def command(self) -> list[str]:
        return self.line.split()


MAKING = {
    "prepare": Job(PREPARE, "source.txt", "text"),
    "prepare_task": Job(ROWS, "rows", "sst2"),
    "prepare_pieces": Job(PIECES, "tokenizer lines.txt", "pieces"),
    "train": Job(f"{TEXT} {EXPERTS} --work_dir=run", "text", "run"),
    "train_dense": Job(f"{TEXT} --method=dense --work_dir=dense --swad --swad_start=3", "text", "dense"),
    "train_bert": Job(f"train.py {HOW} {HERE} {SMALL} {EXPERTS} --model=bert --data=pieces --work_dir=bert", "pieces", "bert"),
    "finetune": Job(TUNING, "sst2 run text", "tuned"),
    "merge": Job(f"{SURGERY} --method=merge --keep=2 --out=merged", "run text", "merged"),
    "keep_best": Job(f"{SURGERY} --method=keep_best --keep=2 --out=kept", "run text", "kept"),
    "compress": Job(f"{SURGERY} --method=compress --rank=2 --kept=0.5 --out=small", "run text", "small"),
    "save": Job("-m tests.faults.library save saved --seed=1", "", "saved"),
    "dense": Job("-m tests.faults.library dense model --seed=1", "", "model"),
    "convert": Job(f"{CONVERT} --out=converted", "model source.txt", "converted"),
    "prepare_tokens": Job("data/prepare.py words --source source.txt --tokenizer converted --out tokens", "converted source.txt", "tokens"),
    "recover": Job(f"{RECOVER} --work_dir=recovered", "converted tokens", "recovered"),
    "microscope": Job("-m utils.microscope run --out seen --tokens 200", "run text", "seen"),
    "collect": Job("-m utils.reporting --collect run", "run", "results"),
}
READING = {  # what reads these folders, or finds its work done
    "page": Job("-m utils.reporting table1 --page page.md --latex page.tex", "results page.md", "page.md page.tex", "page.md"),
    "resume": Job(MAKING["train"].line, "half:run text", "run", PASSED),
    "finished": Job(MAKING["train"].line, "run text", "run", UNREAD),
    "resume_tuned": Job(TUNING, "half_tuned:tuned +sst2 +run +text", "tuned", PASSED),
    "finished_tuned": Job(TUNING, "tuned +sst2 +run +text", "tuned", UNREAD),
    "merged": Job(MAKING["merge"].line, "merged run text", "merged", "merged/checkpoints merged/calibration.safetensors"),
    "evaluate": Job("train.py --eval_only --work_dir=run", "run text"),
    "evaluate_tuned": Job("finetune.py --eval_only --work_dir=tuned", "tuned sst2 +run +text"),
    "start_from": Job(f"{FURTHER} --start_from=run", "run text", "next"),
    "start_small": Job(f"{FURTHER} --start_from=merged", "merged text", "next"),
    "generate": Job("generate.py --checkpoint=run --length=30 --prompt=the --threads=1", "run", prints=True),
    "generate_small": Job("generate.py --checkpoint=merged --length=9 --prompt=the --threads=1", "merged", prints=True),
    "verify": Job(f"{PREPARE} --verify", "text source.txt", "text"),
    "verify_rows": Job(ROWS, "sst2 rows", "sst2"),
    "load": Job("-m tests.faults.library load saved/pretrained", "saved", prints=True),
    "load_weights": Job("-m tests.faults.library load_weights saved/model", "saved", prints=True),
    "load_converted": Job("-m tests.faults.library load converted", "converted", prints=True),
    "start_converted": Job(f"{RECOVER} --max_step=2 --work_dir=next", "converted tokens", "next"),
    "resume_recovered": Job(f"{RECOVER} --work_dir=recovered", "half_recovered:recovered tokens +converted", "recovered", PASSED),
    "repair": Job(f"{MAKING['train'].line} --repair", "half:run +text", "run", PASSED),
    "repair_finished": Job(f"{MAKING['train'].line} --repair", "run +text", "run", UNREAD),
    "repair_tuned": Job(f"{TUNING} --repair", "half_tuned:tuned +sst2 +run +text", "tuned", PASSED),
    "doctor": Job(f"-m utils.doctor {EXAMINED}", "run merged saved text pieces sst2 seen results"),
}
JOBS = MAKING | READING
WRITING = (*MAKING, "page", "evaluate", "resume")  # what is stopped at every operation
MAKERS = {entry: name for name, job in MAKING.items() for entry in job.makes.split()}
HALVES = {"half": ("train", "run"), "half_tuned": ("finetune", "tuned"), "half_recovered": ("recover", "recovered")}


class World:
    """The folders made so far, below `root`; several processes may share it. twin: those of another run, of another seed or source."""

    def __init__(self, root: Path):
        self.root = root.absolute()
        root.mkdir(parents=True, exist_ok=True)

    def folder(self, job: Job, at: Path) -> Path:
        """A new folder `at` with copies of what a job needs."""
        at.mkdir(parents=True)
        for need in job.needs.split():
            entry, _, name = need.removeprefix("+").partition(":")
            copy(self.entry(entry), at / (name or entry))
        return at

    def entry(self, name: str, twin: bool = False) -> Path:
        """The path of an entry, made when first asked for."""
        if name in HALVES:
            return self._half(*HALVES[name], twin)
        return self.done(MAKERS[name], twin) / "tree" / name if name in MAKERS else self._raw() / name

    def done(self, name: str, twin: bool = False) -> Path:
        """The traces of an undisturbed job: tree/, its operations on files in order and wanted.json, what to judge by."""
        job, at = _twin(JOBS[name]) if twin else JOBS[name], self.root / (name + ".twin" * twin)
        with locked(at) as new:
            if new:
                (at / "operations").touch()
                tree = self.folder(job, at / "tree")
                finished = programs.run(job.command, tree, Fault("list", to=str(at / "operations")))
                if finished.code != 0:
                    raise RuntimeError(f"{job.line} fails undisturbed: {finished}")
                (at / "wanted.json").write_text(json.dumps({"files": contents(tree), "out": finished.out, "wall": finished.wall}))
        return at

    def operations(self, name: str) -> list[str]:
        return (self.done(name) / "operations").read_text().splitlines()

    def wanted(self, name: str) -> dict:
        return json.loads((self.done(name) / "wanted.json").read_text())

    def _half(self, name: str, entry: str, twin: bool) -> Path:
        """The folder of a run that was killed before it finished its last checkpoint."""
        job, at = _twin(JOBS[name]) if twin else JOBS[name], self.root / (f"half-{name}" + ".twin" * twin)
        renames = [at for at, line in enumerate(self.operations(name), start=1) if line.startswith("os.rename") and "/.step-" in line]
        with locked(at) as new:
            if new:
                programs.run(job.command, self.folder(job, at / "tree"), Fault("kill", renames[-1] - 1))
        return at / "tree" / entry

    def _raw(self) -> Path:
        """Sources of text and rows, each in two variants, a tokenizer and a page."""
        at = self.root / "raw"
        with locked(at) as new:
            for number in ("", "2") if new else ():
                draw = random.Random(number)
                (at / f"source{number}.txt").write_text(" ".join(draw.choices(tiny.WORDS, k=500)))
                lines = (" ".join(draw.choices(tiny.WORDS[:6], k=8)) for _ in range(400))
                (at / f"lines{number}.txt").write_text("\n".join(lines) + "\n")
                tiny.write_rows(at / f"rows{number}", "sst2", train=14 + 2 * len(number))
                tiny.write_tokenizer(at / "tokenizer")
                (at / "page.md").write_text("# Page\n<!-- table1:begin -->\n<!-- table1:end -->\n")
        return at


def _twin(job: Job) -> Job:
    return job._replace(**{field: " ".join(TWINS.get(word, word) for word in getattr(job, field).split()) for field in ("line", "needs")})


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Return whether the folder is still to be filled, which one process does while others wait."""
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        marker = folder / ".complete"
        if new := not marker.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield new
        marker.touch()


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)


def contents(tree: Path) -> dict[str, str]:
    """The content of every file, by relative path, without times and checksums over times; without events of TensorBoard and locks."""
    paths = {path.relative_to(tree).as_posix(): path for path in sorted(tree.rglob("*")) if path.name != ".lock"}
    return {name: "folder" if path.is_dir() else _content(path) for name, path in paths.items() if "/tensorboard" not in name}


def _content(path: Path) -> str:
    try:
        if path.name == "manifest.json" and "checkpoints" in path.parts:
            return "hashes, of times too"
        if path.name == "env.json":  # an entry for each start, all alike
            starts = _steady(json.loads(path.read_text()))
            return str(sorted({json.dumps(start) for start in (starts["starts"] if isinstance(starts, dict) else starts)}))
        if path.suffix in (".json", ".jsonl"):
            texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            return "\n".join(json.dumps(_steady(json.loads(text))) for text in texts)
    except (ValueError, LookupError, RecursionError):
        pass
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _steady(value):
    if isinstance(value, dict):
        omitted = VOLATILE | ({"sha256"} if "format" in value else set()) | ({"metrics"} if "best_step" in value else set())
        return {name: _steady(entry) for name, entry in value.items() if name not in omitted}
    return [_steady(entry) for entry in value] if isinstance(value, list) else value
