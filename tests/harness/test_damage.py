"""Damaged run folders: whatever is done with one, the numbers are those of the intact one, or the damaged file is named."""

import contextlib
import hashlib
import io
import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests import tiny

SHORT = {"method": "smoe_dropout", "max_step": 12, "eval_interval": 4, "log_interval": 4, "dropout": 0.2}
KEPT = (4, 8, 12)  # the best, the validation before the end, the last
BESIDE = ("config.json", "env.json", "metrics.jsonl", "result.json")
CHECKPOINT = (
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "rank0.json",
    "rank0.safetensors",
    "smoe_config.json",
    "state.json",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words", train_bytes=2000)


def reverse_quality() -> None:
    """Makes the first validation the best one, since the text is learned."""
    import train
    from utils.training import evaluation, state

    evaluate = evaluation.evaluate

    def reversed_(*arguments):
        found = evaluate(*arguments)
        return {**found, "bpc": 16 - found["bpc"]}

    evaluation.evaluate = train.evaluate = state.evaluate = reversed_


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Two finished runs that differ in their seed."""
    folders = [tmp_path_factory.mktemp("finished") / name for name in ("run", "other")]
    for seed, folder in enumerate(folders):
        tiny.completed(tiny.flags(corpus, folder, seed=seed, **SHORT), reverse_quality)
    return folders


def delete(path: Path, _other: Path) -> None:
    path.unlink()


def truncate(path: Path, _other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, _other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


def empty(path: Path, _other: Path) -> None:
    path.write_bytes(b"")


class Uses:
    """All that is done with a run folder, in this process. Each returns the numbers that came out."""

    def __init__(self, corpus: Path):
        self.corpus = corpus

    def _run(self, folder: Path, *more: str):
        from utils.cli.train import parse
        from utils.data.corpus import Corpus
        from utils.engine import Engine
        from utils.training.setup import pretraining_run

        training = [*tiny.flags(self.corpus, folder, seed=0, **SHORT), *more]
        arguments = ["--eval_only", "--work_dir", str(folder)] if "--eval_only" in more else training
        sys.argv = ["train.py", *arguments]
        flags, source = parse(arguments)
        return pretraining_run(flags, Corpus.open(flags.data), Engine(flags), source)

    def finish(self, folder: Path, *more: str):
        from train import main

        if not more:
            (folder / "result.json").unlink(missing_ok=True)
        main(self._run(folder, *more))
        result = tiny.read_json(folder / "result.json")
        return tiny.quality(result), result["best_step"], result["curve"], result["routing"], tiny.metrics(folder)

    def resume(self, folder: Path):
        shutil.rmtree(folder / "checkpoints" / "step-00000012")
        return self.finish(folder)

    def complete(self, folder: Path):
        from train import main

        return main(self._run(folder))

    def evaluate(self, folder: Path):
        from train import evaluate_run

        evaluate_run(self._run(folder, "--eval_only"))
        return tiny.quality(tiny.read_json(folder / "eval.json"))

    def load(self, folder: Path):
        from utils.checkpoints import weights
        from utils.checkpoints.origin import open_run
        from utils.models.build import build_model

        source = open_run(folder)
        model = build_model(source.made)
        weights.load(model, source)
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest(), source.trained[
            "steps"
        ]

    def load_step(self, folder: Path):
        return self.load(folder / "checkpoints" / "step-00000008")

    def routing(self, folder: Path):
        from utils.training import routing

        routing.main([routing.open_finished(folder)])
        return tiny.read_json(folder / "result.json")["routing"]


USES = ("finish", "resume", "complete", "evaluate", "load", "load_step", "routing")


def try_all(corpus: str, run: str, other: str, work: str, stride: int) -> None:
    """Raises an error that lists every use of a damaged folder that is neither refused by the file's name nor exact."""
    from utils.errors import UserError

    reverse_quality()
    uses, faults, tried, refused = Uses(Path(corpus)), [], 0, 0

    def outcome(use: str, folder: Path):
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            try:
                return json.dumps(getattr(uses, use)(folder)), said.getvalue()
            except UserError as error:
                return error, said.getvalue()

    def copied() -> Path:
        shutil.rmtree(work, ignore_errors=True)
        return Path(shutil.copytree(run, work))

    whole = {use: outcome(use, copied())[0] for use in USES}
    files = [*BESIDE, *(f"checkpoints/step-{step:08d}/{name}" for step in KEPT for name in CHECKPOINT)]
    table = itertools.product(files, (delete, truncate, flip, swap, empty), USES)
    for name, damage, use in itertools.islice(table, 0, None, stride):
        if (use in ("finish", "resume") and name == "result.json") or (use == "resume" and "step-00000012" in name):
            continue  # they remove it
        folder = copied()
        damage(folder / name, Path(other) / name)
        found, said = outcome(use, folder)
        tried += 1
        refused += isinstance(found, UserError)
        named = Path(name).name in str(found) or str((folder / name).parent) in str(found)
        if found != whole[use] and not (isinstance(found, UserError) and named and "\n" not in str(found)):
            faults.append(f"{damage.__name__} {name}, {use}: {str(found)[:300]} {said[-300:]}")
        elif not isinstance(found, UserError) and list(folder.rglob(".*.partial")) + list(folder.rglob(".*.removed")):
            faults.append(f"{damage.__name__} {name}, {use}: leftovers")
    print(f"{tried} tries, {refused} refused")
    assert not faults, "\n".join([f"{len(faults)} of {tried}:", *faults])


def test_a_damaged_file_is_named_or_changes_nothing(corpus, finished, tmp_path):
    tiny.call(try_all, str(corpus), *map(str, finished), str(tmp_path / "work"), 37)


def repair_all(corpus: str, run: str, other: str, work: str) -> None:
    """Damages one file after another of a run that needs only its final test; each is refused, then repaired."""
    from utils.errors import UserError

    reverse_quality()
    uses, folder = Uses(Path(corpus)), Path(work)
    whole = uses.finish(Path(shutil.copytree(run, f"{work}-whole")))
    assert whole[1] == 4 and tiny.metrics(Path(run))
    table = {
        "env.json": ["env.json of earlier starts"],
        "metrics.jsonl": ["metrics.jsonl up to step 12"],
        "config.json": [],
        "checkpoints/step-00000004/model.safetensors": ["the best checkpoint, of step 4"],
        "checkpoints/step-00000008/state.json": ["the change of routing since step 8"],
        "result.json": [],
    }

    def damaged(name: str, damage) -> Path:
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(run, work)
        if name != "result.json":
            (folder / "result.json").unlink()
        damage(folder / name, folder)
        return folder

    for (name, lost), damage in zip(table.items(), itertools.cycle((delete, flip)), strict=False):
        with pytest.raises(UserError, match=f"{name}.* --repair") as error, contextlib.redirect_stdout(io.StringIO()) as said:
            uses.complete(damaged(name, damage))
        assert "\n" not in str(error.value) and "resumed" not in said.getvalue()  # it is refused before training goes on
        damaged(name, damage)
        quality, step, curve, routing, _ = uses.finish(folder, "--repair")
        result = tiny.read_json(folder / "result.json")
        assert sorted(result.get("lost", [])) == sorted(lost), (name, result.get("lost"))
        assert "checkpoints" in name or (quality, step, routing) == (whole[0], 4, whole[3])
        assert (step == 4) == ("step-00000004" not in name) and bool(curve["train"]) == (name != "metrics.jsonl")
        assert uses.evaluate(folder) == [{k: v for k, v in row.items() if not k.startswith("valid")} for row in quality]


def repair_finished(corpus: str, run: str, work: str) -> None:
    """A finished run whose best checkpoint is damaged says so; with --repair the best of the others takes its place."""
    reverse_quality()
    uses, folder = Uses(Path(corpus)), Path(shutil.copytree(run, work))
    flip(folder / "checkpoints/step-00000004/model.safetensors", folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert uses.complete(folder) == 0
    assert "step-00000004/model.safetensors is damaged" in said.getvalue() and "is complete" in said.getvalue()
    uses.finish(folder, "--repair")
    assert tiny.read_json(folder / "result.json")["lost"] == ["the best checkpoint, of step 4"]
    shutil.rmtree(folder / "checkpoints")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert uses.complete(folder) == 0
    assert said.getvalue().startswith("this run is complete")  # checkpoints may be removed when they are not needed any more


def test_repair_of_a_finished_run(corpus, finished, tmp_path):
    tiny.call(repair_finished, str(corpus), str(finished[0]), str(tmp_path / "work"))


def evaluate_others(corpus: str, run: str, work: str) -> None:
    """Evaluates a run that has not ended, and refuses other word pieces."""
    from train import evaluate_run
    from utils import documents
    from utils.errors import UserError

    uses, folder = Uses(Path(corpus)), Path(shutil.copytree(run, work))
    whole = uses.evaluate(folder)
    (folder / "result.json").unlink()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert uses.evaluate(folder) == whole
    assert said.getvalue().startswith("the run has not ended: scoring step 4, the best so far on validation\n")
    other = {"vocabulary_sha256": "0" * 64}
    documents.write(folder / "config.json", tiny.read_json(folder / "config.json") | other)
    run = uses._run(folder, "--eval_only")
    run.fingerprints = lambda whole=run.fingerprints: whole() | {"vocabulary_sha256": "1" * 64}
    with pytest.raises(UserError, match="was trained with another vocabulary_sha256"):
        evaluate_run(run)


def test_evaluation_says_what_it_scores(corpus, finished, tmp_path):
    tiny.call(evaluate_others, str(corpus), str(finished[0]), str(tmp_path / "work"))


def test_a_state_of_version_0_1_before_the_first_validation_is_read(tmp_path):
    from utils.documents import read
    from utils.training.state import State

    (tmp_path / "state.json").write_text('{"step": 3, "best": Infinity, "best_step": 0}')
    assert read(tmp_path / "state.json", State, "restore it", nullable=True) == {"step": 3, "best": None, "best_step": 0}


def test_repair_continues_from_what_is_intact_and_records_what_was_lost(corpus, finished, tmp_path):
    tiny.call(repair_all, str(corpus), *map(str, finished), str(tmp_path / "work"))
