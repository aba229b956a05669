"""Checks whether folders are intact, and names what is damaged and what can be done: python -m utils.doctor PATH...

PATH: a run, a folder of surgery.py, a checkpoint, a saved model, a prepared text, the rows of a task, a folder of the microscope, a
record, or a folder of records.
Each part is read by the code that uses it. Exit code 0: all is intact; 1: something is damaged, missing or unfinished; 2: a path is none
of these.
"""

import fcntl
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from smoe_dropout.config import read_configs
from smoe_dropout.files import read_json, read_object
from smoe_dropout.manifest import hashes, verified
from smoe_dropout.options import ConfigError
from utils import documents
from utils.checkpoints import run_files
from utils.checkpoints.manifest import MANIFEST, STATE, WEIGHTS, Stored, name_of, steps, verify
from utils.checkpoints.origin import EXPERTS
from utils.checkpoints.run_files import CALIBRATION, CONFIG, ENVIRONMENT, METRICS, MODEL, RESULT, SURGERY
from utils.data.corpus import split_file
from utils.data.meta import META, ROWS, SPLITS, TOKENIZER, RowsMeta, TextMeta, fault_of, tokenizer_fault
from utils.data.rows import TASKS, kind_of, read_examples
from utils.documents import Content
from utils.errors import Parser, UserError, run_main
from utils.reporting.microscope_record import RECORD, read_examination
from utils.reporting.records import PUBLISHED, REMEDY, files_below, read_published, read_record

EVALUATION = "eval.json"
UNVERIFIED = "readable, but without checksum, as in earlier versions: its content cannot be verified"
LEFT = "harmless, left by an interrupted process: the next start removes it"


class Checkup:
    """The parts of a folder, each reported on a line. parts: how many; faults: how many are damaged, missing or unfinished."""

    def __init__(self, folder: Path):
        self.folder, self.parts, self.faults, self.unverified = folder, 0, 0, 0

    def report(self, part: str | Path, state: str, fault: bool = False) -> None:
        self.parts += 1
        self.faults += fault
        self.unverified += state.endswith(UNVERIFIED)
        print(f"  {part}: {state}", flush=True)

    def read(self, part: str, reading: Callable[[], Any], missing: str = "") -> None:
        """Reads a part, and reports what it returns or the error it raises. missing: the remedy if there is none."""
        path = self.folder / part
        if missing and not os.path.lexists(path):
            return self.report(part, f"missing: {missing}", fault=True)
        if sys.stderr.isatty():
            print(f"  reading {part} ...", end="", file=sys.stderr, flush=True)
        try:
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError("it is not a file: remove it")  # a pipe, which would be read for ever
            said = reading()
            state = said if isinstance(said, str) else UNVERIFIED if _lacks_checksum(path) else "intact"
            fault = False
        except (UserError, ConfigError, SafetensorError, OSError) as error:
            state, fault = _fault_of(error, path), True
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self.report(part, state, fault)

    def report_left(self, paths: Iterable[Path], state: str = LEFT) -> None:
        for path in sorted(paths):
            self.report(path.relative_to(self.folder) if path.is_relative_to(self.folder) else path, state)


def _fault_of(error: Exception, path: Path) -> str:
    text = str(error).removeprefix(f"{path} ").removeprefix("is ")
    return text if text.startswith("damaged") else f"damaged: {text}"


def _lacks_checksum(path: Path) -> bool:
    if path.suffix != ".json" or path.name == MANIFEST or not path.is_file():
        return False
    value = read_json(path)
    return not isinstance(value, dict) or not documents.is_sealed(value)


def check_run(checkup: Checkup) -> None:
    """A run, or a folder of surgery.py."""
    folder, manifests, identity = checkup.folder, {}, None
    root, remedy, operated = folder / "checkpoints", run_files.remedy_for(folder), (folder / SURGERY).exists()

    def read_config() -> None:
        nonlocal identity, operated
        config = run_files.read_config(folder)
        identity, operated = run_files.config_sha256(config), operated or "surgery" in config

    def belonging(read: Callable[[str], Any]) -> Callable[[], Any]:
        return lambda: read(identity) if identity else f"not verified, because {CONFIG} is not intact"

    if _is_running(folder):
        print("  in use by a process: what it writes or removes while it is examined may appear damaged")
    checkup.read(CONFIG, read_config, remedy)
    unfinished = "unfinished: run the command of surgery.py again"
    for step in sorted({*steps(root), *([0] if operated else [])}):
        part = f"checkpoints/{name_of(step)}"
        checkup.read(part, lambda at=step: manifests.update({at: verify(root / name_of(at), identity, remedy)}), unfinished)
    if operated:
        checkup.read(SURGERY, belonging(lambda own: run_files.read_surgery(folder, own)), unfinished)
        checkup.read(CALIBRATION, belonging(lambda own: _read_calibration(folder, own)))
    else:
        newest = max(manifests, default=None)
        logs = run_files.remedy_of_logs(folder)
        checkup.read(ENVIRONMENT, belonging(lambda own: run_files.read_starts(folder, own)), logs)
        checkup.read(METRICS, lambda: _read_metrics(folder, newest), logs)
        unfinished = "the run has not ended: run its command again, which resumes from the newest checkpoint"
        checkup.read(RESULT, belonging(lambda own: _read_result(folder, own, manifests)), unfinished)
    if (folder / EVALUATION).exists():
        checkup.read(EVALUATION, lambda: documents.read(folder / EVALUATION, dict, "evaluate again with --eval_only"))
    for path in sorted(folder.glob("tensorboard/events*")):
        checkup.read(str(path.relative_to(folder)), lambda path=path: _read_events(path))
    checkup.report_left([*folder.glob("*.partial"), *root.glob(".step-*")])


def _is_running(folder: Path) -> bool:
    """Return whether a process holds the lock of a run."""
    if not (folder / run_files.LOCK).is_file():
        return False
    try:
        with open(folder / run_files.LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)


def _read_calibration(folder: Path, identity: str) -> str | None:
    known = run_files.verify_calibration(folder, identity)
    return None if known else UNVERIFIED if (folder / CALIBRATION).exists() else "none"


def _read_metrics(folder: Path, step: int | None) -> str:
    if step is None:
        return "not verified, because there is no intact checkpoint"
    state = folder / "checkpoints" / name_of(step) / STATE
    known = documents.read(state, Stored, run_files.remedy_for(folder), nullable=True).get("metrics")
    recorded = run_files.recorded_metrics(folder, step, known)
    if not known:
        return UNVERIFIED
    beyond = (folder / METRICS).stat().st_size - len(recorded)
    said = f"; the {beyond:,} bytes after it are not verified, and are cut away when the run is resumed" if beyond else ""
    return f"intact up to step {step:,}, the newest intact checkpoint{said}"


def _read_result(folder: Path, identity: str, manifests: dict[int, dict[str, Content]]) -> None:
    record = run_files.read_result(folder, identity)
    read_record(folder / RESULT)
    weights = manifests.get(record["best_step"], {}).get(WEIGHTS, {}).get("sha256")
    if weights is None or record.get("weights_sha256", weights) != weights:
        fault = "are not intact" if weights is None else "are not those that it records"
        raise UserError(f"its weights, of step {record['best_step']}, {fault}: {run_files.remedy_for(folder)}")


def _read_events(path: Path) -> str | None:
    """Reads all events by tensorboard's own reader, which compares their checksums."""
    from tensorboard.compat.tensorflow_stub import errors
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

    reader = PyRecordReader_New(str(path))
    try:
        while True:
            reader.GetNext()
    except errors.OutOfRangeError:
        return None
    except errors.DataLossError as error:
        if "truncated" in str(error):
            return "its last event was cut by a kill, which is harmless"
        raise UserError(f"{str(error).removeprefix(f'{path} ')}: remove it, the numbers are in {METRICS}") from None


def check_checkpoint(checkup: Checkup) -> None:
    """One checkpoint of a run."""
    checkup.read(".", lambda: verify(checkup.folder))


def check_text(checkup: Checkup) -> None:
    """A prepared text."""
    folder, meta = checkup.folder, {}
    program = "prepare_pieces" if (folder / TOKENIZER).exists() else "prepare"
    again = f"prepare the text again with data/{program}.py and --force"
    checkup.read(META, lambda: meta.update(documents.read(folder / META, TextMeta, again)), again)
    for split in SPLITS if meta else ():
        name = split_file(folder, split).name
        entry = {name: meta["splits"][split]}
        checkup.read(name, lambda entry=entry: _refuse(fault_of(folder, entry, META, content=True), again), again)
    if (folder / TOKENIZER).exists() or "files" in meta:
        checkup.read(TOKENIZER, lambda: _refuse(tokenizer_fault(folder, meta), again) or (None if "files" in meta else UNVERIFIED))
    _report_left_by_preparation(checkup)


def _refuse(fault: str | None, remedy: str) -> None:
    if fault:
        raise UserError(f"{fault}: {remedy}")


def _report_left_by_preparation(checkup: Checkup) -> None:
    folder = checkup.folder.resolve()
    remedy = "harmless, left by an interrupted process: preparing it again removes it"
    checkup.report_left(folder.parent.glob(f".{folder.name}.*.tmp"), remedy)


def check_rows(checkup: Checkup) -> None:
    """The rows of a fine-tuning task, in every fold."""
    folder, tasks = checkup.folder, _tasks_in(checkup.folder)

    def read_rows() -> None:
        tasks.insert(0, documents.read(folder / ROWS, RowsMeta, "prepare the rows again with data/prepare_task.py and --force")["task"])

    known = UNVERIFIED
    if (folder / ROWS).exists():
        checkup.read(ROWS, read_rows)
        known = "intact"
    for fold in range(kind_of(tasks[0]).folds if tasks else 0):
        title = " and ".join(kind_of(tasks[0]).files(fold))
        checkup.read(title, lambda fold=fold: f"{read_examples(tasks[0], folder, fold).title}: {known}")
    _report_left_by_preparation(checkup)


def _tasks_in(folder: Path) -> list[str]:
    """The tasks whose files are there, first the one that the folder is named after."""
    found = [task for task in TASKS if any((folder / name).exists() for name in kind_of(task).files(0))]
    return sorted(found, key=lambda task: task != folder.resolve().name)


def _open_weights(path: Path) -> str:
    """Reads the names and sizes of tensors only: there is nothing to compare their values with."""
    with safe_open(path, "numpy"):
        return UNVERIFIED


def check_saved(checkup: Checkup) -> None:
    """A folder of save_model or save_pretrained."""
    folder, known = checkup.folder, {}

    def compare(name: str) -> str:
        with verified({name: known[name]}, folder, lambda name: folder / name if (folder / name).is_file() else None):
            return "intact"

    def read_manifest() -> str:
        known.update(hashes(folder / MANIFEST))
        return "intact" if "checksum" in read_object(folder / MANIFEST) else UNVERIFIED

    if (folder / MANIFEST).exists():
        checkup.read(MANIFEST, read_manifest)
    for name in known:
        checkup.read(name, lambda name=name: compare(name))
    for path in sorted(path for path in folder.glob("*.safetensors") if path.name not in known):
        checkup.read(path.name, lambda path=path: _open_weights(path))
    if (folder / EXPERTS).exists() and EXPERTS not in known:
        checkup.read(EXPERTS, lambda: read_configs(folder / EXPERTS))
    if (folder / CONFIG).exists() and CONFIG not in known:
        checkup.read(CONFIG, lambda: read_object(folder / CONFIG) and UNVERIFIED)
    if not list(folder.glob("*.safetensors")) and not known:
        checkup.report(WEIGHTS, "missing: restore it from a copy, or save the model again", fault=True)
    checkup.report_left(folder.glob(".saving-*"), "harmless, left by an interrupted process: the next save removes it")


def check_records(checkup: Checkup) -> None:
    """A record, or a folder of records, of which only the number of intact ones is reported."""
    intact = 0
    for path in files_below(checkup.folder, "*.json"):
        unverified: list[Path] = []
        try:
            if path.name == PUBLISHED.name:
                read_published(path)
            elif {"benchmark", "data_sha256"}.isdisjoint(documents.read(path, dict, REMEDY, unverified.append)):  # or of convert.py
                read_record(path)
        except UserError as error:
            checkup.report(path, _fault_of(error, path), fault=True)
            continue
        if unverified:
            checkup.report(path, UNVERIFIED)
        else:
            intact += 1
    checkup.parts += intact
    print(f"  {intact:,} {'file is' if intact == 1 else 'files are'} intact")


def check_examination(checkup: Checkup) -> None:
    """A folder of the microscope."""
    checkup.read(RECORD, lambda: read_examination(checkup.folder) and "intact")


Check = Callable[[Checkup], None]
RUN_FILES = {RESULT, ENVIRONMENT, METRICS, "checkpoints", run_files.LOCK}


def recognise(path: Path) -> tuple[str, Check] | None:
    """The kind of a path, by the names of its files, in words, and its check; None for another kind."""
    if not path.is_dir():
        return ("a record", check_records) if path.suffix == ".json" and path.exists() else None
    here = {entry.name for entry in path.iterdir()}
    saved = bool({MANIFEST, EXPERTS} & here) or any(name.endswith(".safetensors") for name in here)
    kinds: list[tuple[Any, str, Check]] = [
        (STATE in here, "a checkpoint", check_checkpoint),
        (SURGERY in here, "a folder of surgery.py", check_run),
        (RESULT in here and CONFIG in here, "a finished run", check_run),
        (here & RUN_FILES or (CONFIG in here and not saved and _is_of_run(path / CONFIG)), "an unfinished run", check_run),
        (META in here or here & {split_file(path, split).name for split in SPLITS}, "a prepared text", check_text),
        (ROWS in here or _tasks_in(path), "the rows of a task", check_rows),
        (saved or CONFIG in here, "a saved model", check_saved),
        (RECORD in here, "a folder of the microscope", check_examination),
        (_holds_records(path), "a folder of records", check_records),
    ]
    return next(((kind, check) for holds, kind, check in kinds if holds), None)


def _is_of_run(config: Path) -> bool:
    """Return whether a config.json has flags, and is not that of another library's model."""
    try:
        return "preset" in read_object(config)
    except ConfigError:
        return False


def _holds_records(folder: Path) -> bool:
    """Return whether there are JSON files below, and none of a run, a model or data."""
    names = {path.name for path in files_below(folder, "*.json")}
    return bool(names) and not names & {CONFIG, STATE, META, MANIFEST, ROWS, ENVIRONMENT}


def examine(path: Path) -> int:
    """Prints what a path is and the state of its parts; returns its exit code."""
    try:
        found = recognise(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if found is None:
        fault = "is none of the kinds that this program knows" if os.path.lexists(path) else "does not exist"
        print(f"error: {path} {fault}: give a run, a saved model, prepared data, or records", file=sys.stderr)
        return 2
    kind, check = found
    print(f"{path}: {kind}")
    checkup = Checkup(path)
    check(checkup)
    verdict = "intact, as far as it can be verified" if checkup.unverified else "intact"
    print(f"{path}: {f'{checkup.faults} of {checkup.parts} parts damaged, missing or unfinished' if checkup.faults else verdict}")
    made = [*path.glob(f"*/{SURGERY}"), *path.glob(f"{MODEL}/{CONFIG}")]  # by a run that pruned experts, or trained a model of transformers
    inner = [examine(one.parent) for one in made] if check is check_run else []
    return max([int(checkup.faults > 0), *inner])


def main(argv: list[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = Parser(prog="python -m utils.doctor", description=__doc__.partition(":")[0] + ".")
    kinds = "run, folder of surgery.py, checkpoint, saved model, prepared text, rows of a task, record, or folder of records"
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=kinds)
    return max([examine(path) for path in parser.parse_args(argv).paths])


if __name__ == "__main__":
    run_main(main)
