"""Checkpoints that fine-tuning may start from, flags that they set, and refusals before any work."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from smoe_dropout import SMoEConfig, moefy, save_model, save_pretrained
from smoe_dropout.io import load_weights
from tests import tiny
from tests.harness.test_finetune import command, made, pretrained, pytestmark, refusal, rows, run_of  # noqa: F401 (fixtures)
from utils import documents
from utils.checkpoints.origin import open_source
from utils.checkpoints.run_files import config_sha256
from utils.cli.finetune import parse
from utils.errors import UserError
from utils.models.build import build_model
from utils.training.identity import departures_of as departures
from utils.training.identity import training_of
from utils.training.run_folder import RunFolder


@pytest.fixture
def run(pretrained, tmp_path) -> Path:  # noqa: F811
    """A copy of a pre-training run that may be damaged."""
    return Path(shutil.copytree(pretrained("smoe_dropout"), tmp_path / "run"))


@pytest.fixture
def refused(rows):  # noqa: F811
    """Returns the message that refuses a command line."""

    def of(checkpoint: Path, task: str = "sst2", **changes) -> str:
        with pytest.raises(UserError) as error:
            made(command(task, rows, checkpoint, **changes))
        return str(error.value)

    return of


def same_weights(network, run: Path) -> bool:
    best = tiny.read_json(run / "result.json")["best_step"]
    stored = load_weights(build_model(parse(["--checkpoint", str(run)])[0]), run / "checkpoints" / f"step-{best:08d}").state_dict()
    return all(torch.equal(stored[name], tensor) for name, tensor in network.backbone.state_dict().items())


def test_a_run_and_its_checkpoint_folder_are_the_same_start(run, rows):  # noqa: F811
    best = tiny.read_json(run / "result.json")["best_step"]
    for start in (run, run / "checkpoints" / f"step-{best:08d}"):
        tuning, network = run_of(command("sst2", rows, start))
        assert same_weights(network, run) and tuning.source.summary.endswith((", 4 steps", f", step {best}"))


def test_weights_alone_need_the_sizes(run, rows, refused, tmp_path):  # noqa: F811
    """Sizes that are not given are those of the preset; a mismatch names both shapes."""
    task, network = made(command("sst2", rows, run))
    best = tiny.read_json(run / "result.json")["best_step"]
    save_model(load_weights(build_model(task.flags), run / "checkpoints" / f"step-{best:08d}"), tmp_path / "weights")
    sizes = {name: tiny.TINY[name] for name in ("n_layer", "n_head", "d_head", "d_model", "d_ff", "preset")} | {"method": "smoe_dropout"}
    tuning, network = run_of(command("sst2", rows, tmp_path / "weights", **sizes))
    assert same_weights(network, run) and tuning.source.trained == {"folder": "weights"}
    text = refused(tmp_path / "weights", **{**sizes, "d_model": 48})
    assert "cannot be loaded" in text and "has shape (256, 32)" in text and "expects shape (256, 48)" in text
    assert "d_head" not in text


def test_a_model_of_the_library_is_a_start(rows, pretrained, tmp_path):  # noqa: F811
    """Saved by smoe_dropout.save_pretrained or by transformers; the router is the saved one."""
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    words = tiny.write_tokenizer(tmp_path / "tokenizer")
    vocabulary = len((words / "vocab.txt").read_text().split())
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(**sizes, vocab_size=vocabulary, hidden_act="relu")
    model = moefy(BertForMaskedLM(config), SMoEConfig(num_experts=4, top_k=2))
    save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        task, network = made(command("sst2", rows, tmp_path / name, tokenizer=words, method="smoe_dropout", preset="quick"))
        assert (task.flags.model, task.flags.n_layer, task.flags.d_model, task.flags.moe_num_expert) == ("bert", 2, 16, 4)
        stored = model.state_dict()
        kept = {name.removeprefix("host."): tensor for name, tensor in network.backbone.state_dict().items()}
        assert kept.keys() == {name for name in stored if not name.startswith("cls.")}
        assert all(torch.equal(stored[name], tensor) for name, tensor in kept.items())
        assert network.backbone.host.config.hidden_act == "relu"
        assert not any(parameter.requires_grad for name, parameter in network.named_parameters() if "router" in name)
    with pytest.raises(UserError, match=r"tokenizer of .* give its folder"):
        made(command("sst2", rows, tmp_path / "ours", method="smoe_dropout", preset="quick"))
    other = moefy(BertForSequenceClassification(config), SMoEConfig(num_experts=4, top_k=2))
    save_pretrained(other, tmp_path / "other")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):  # as any other model: by its own tokenizer
        made(command("sst2", rows, tmp_path / "other", tokenizer=words, preset="quick"))
    twice = BertForMaskedLM(config)
    for layer in (0, 1):
        twice = moefy(twice, SMoEConfig(num_experts=4, top_k=2, layers=(layer,)))
    save_model(twice, tmp_path / "twice")
    with pytest.raises(UserError, match="twice holds a model that was converted more than once, which cannot be trained here"):
        made(command("sst2", rows, tmp_path / "twice", tokenizer=words))


def test_no_checkpoint(refused, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "is a file" in refused(tmp_path / "file")
    assert "holds no checkpoint" in refused(tmp_path / "empty")
    with pytest.raises(UserError, match="--checkpoint is missing"):
        parse(["--task", "sst2"])


def test_a_run_that_has_not_ended(run, refused):
    (run / "result.json").unlink()
    assert "has not ended" in refused(run) and "checkpoints/step-*" in refused(run)


def test_a_damaged_run(run, refused):
    best = tiny.read_json(run / "result.json")["best_step"]
    weights = run / "checkpoints" / f"step-{best:08d}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert f"{weights} is damaged" in refused(run)
    weights.unlink()
    assert "is missing or incomplete" in refused(run)
    (run / "result.json").write_text("{")
    assert "result.json is not readable as JSON" in refused(run)
    config = tiny.read_json(run / "config.json")
    del config["d_model"]
    (run / "config.json").write_text(json.dumps(config))
    assert "is damaged: it is without d_model, as of another version" in refused(run)
    (run / "config.json").write_text("[]")
    assert "config.json is damaged" in refused(run)


def test_a_fine_tuned_run_is_no_start(rows, pretrained, refused, tmp_path):  # noqa: F811
    folder = tmp_path / "fine-tuned"
    tiny.completed(command("sst2", rows, pretrained("dense"), work_dir=folder), program="finetune.py")
    assert "is a fine-tuned run of sst2" in refused(folder)


@pytest.mark.parametrize(
    ("method", "expect", "said"),
    [
        ("dense", "smoe_dropout", "of --method dense, without experts, not of --method smoe_dropout"),
        ("smoe_dropout", "dense", "of --method smoe_dropout, with experts, not of a dense method"),
        ("smoe", "smoe_dropout", "of --method smoe, with experts, not of --method smoe_dropout"),
        ("smoe", "smoe_dropuot", "unknown value 'smoe_dropuot'; "),
    ],
)
def test_a_checkpoint_of_another_method(method, expect, said, pretrained, refused):  # noqa: F811
    assert said in refused(pretrained(method), expect=expect)


def test_any_dense_checkpoint_is_dense(rows, pretrained):  # noqa: F811
    """The checkpoint of directly_dense_training.sh is dense; its dropout is used in fine-tuning."""
    flags, source = parse(command("sst2", rows, pretrained("dense_dropout"), expect="dense"))
    assert (flags.method, flags.dropout) == ("dense_dropout", 0.1)
    assert departures(flags, source)[1] == {}


@pytest.mark.parametrize(
    "flag", [{"n_layer": 3}, {"d_model": 64}, {"moe_num_expert": 8}, {"gate_name": "learned"}, {"output_scale": "dense"}]
)
def test_flags_inherited_from_the_checkpoint(flag, pretrained, refused):  # noqa: F811
    name, value = next(iter(flag.items()))
    assert f"--{name} {value}, but the checkpoint" in refused(pretrained("smoe_dropout"), **flag)


def test_another_model_than_the_checkpoint(pretrained, refused):  # noqa: F811
    assert "--model bert, but the checkpoint" in refused(pretrained("dense"), model="bert")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"task": "sst3"}, "unknown value 'sst3'; "),
        ({"fold": 5}, "--fold 5 must be from 0 to 4"),
        ({"fold": 1}, "has no folds"),
        ({"max_eval_steps": 3}, "the score covers all rows"),
        ({"scheduler": "dev_perf"}, "tune on the rows the score is reported on"),
        ({"max_length": 20}, "and --max_length is 20: raise it"),
        ({"batch_size": 31}, "has 30 rows, and --batch_size is 31"),
        ({"lr": -1}, "--lr -1.0 must be above 0"),
        ({"moe_top_k": 5}, "--moe_top_k 5 must be from 1 to --moe_num_expert 4"),
        ({"preset": "huge"}, "--preset: unknown"),
    ],
)
def test_wrong_flags(flags, said, pretrained, refused):  # noqa: F811
    assert said in refused(pretrained("smoe_dropout"), **flags)


def test_a_checkpoint_that_does_not_fit_spoils_no_folder(rows, pretrained, tmp_path):  # noqa: F811
    save_model(made(command("svamp", rows, pretrained("dense")))[1].backbone, tmp_path / "weights")
    sizes = {name: tiny.TINY[name] for name in ("n_layer", "n_head", "d_head", "d_model", "d_ff", "preset")} | {
        "method": "dense",
        "yes": True,
    }
    folder = tmp_path / "run"
    assert "cannot be loaded" in refusal(command("sst2", rows, tmp_path / "weights", work_dir=folder, **{**sizes, "d_model": 48}))
    assert not folder.exists() or not (folder / "config.json").exists()
    tiny.completed(command("sst2", rows, tmp_path / "weights", work_dir=folder, **sizes), program="finetune.py")


def test_methods_that_would_look_at_padding_are_refused(rows, pretrained):  # noqa: F811
    from smoe_dropout.registry import METHODS

    if "similarity" not in METHODS:
        pytest.skip("similarity is not here")
    with pytest.raises(UserError, match="--method similarity routes a token of bert by its neighbours"):
        made(command("sst2", rows, pretrained("similarity", "bert")))
    made(command("sst2", rows, pretrained("similarity")))


def test_missing_rows_are_refused_before_torch_is_imported(pretrained, tmp_path):  # noqa: F811
    arguments = ["--checkpoint", str(pretrained("dense")), "--data", str(tmp_path / "nothing"), "--work_dir", str(tmp_path / "run")]
    text = refusal(arguments)
    assert "does not exist" in text and "python data/prepare_task.py sst2" in text and not (tmp_path / "run").exists()


def test_k_is_all_experts_unless_the_method_or_the_user_says_otherwise(rows, pretrained):  # noqa: F811
    def schedule(method: str, **changes) -> tuple:
        flags, source = parse(command("sst2", rows, pretrained(method), **changes))
        departed = departures(flags, source)[1]
        return flags.moe_top_k, flags.dynamic_moe, departed

    assert schedule("smoe_dropout") == schedule("smoe") == (4, False, {})
    assert schedule("thor") == (1, False, {})
    assert schedule("elastic") == (4, False, {}) and schedule("elastic", dynamic_moe=True)[2] == {"dynamic_moe": True}
    assert schedule("smoe_dropout", moe_top_k=2) == (2, False, {"moe_top_k": 2})
    assert schedule("smoe_dropout", dynamic_moe=True)[1:] == (True, {"dynamic_moe": True})
    assert schedule("dense", from_scratch=True)[2] == {"from_scratch": True}


def test_departures_in_pre_training_make_another_row(rows, tmp_path):  # noqa: F811
    """It is not averaged with runs of the plain method."""
    words = tiny.write_corpus(tmp_path / "words")
    changes = {"max_step": 2, "eval_interval": 2, "method": "smoe_dropout", "moe_top_k_min": 1, "output_scale": "dense"}
    tiny.completed(tiny.flags(words, tmp_path / "run", **changes))

    def identity(**changes) -> tuple[dict, dict]:
        flags, source = parse(command("sst2", rows, tmp_path / "run", **changes))
        return departures(flags, source)[1], training_of(source)["settings"]

    before = {"moe_num_expert": 4, "moe_top_k_min": 1, "output_scale": "dense"}
    assert identity() == ({"output_scale": "dense"}, before)
    assert identity(from_scratch=True) == ({"output_scale": "dense", "from_scratch": True}, before)


def test_another_tokenizer_of_the_same_size(rows, pretrained, tmp_path):  # noqa: F811
    words = tiny.write_tokenizer(tmp_path / "tokenizer")
    pieces = (words / "vocab.txt").read_text().split()
    made(command("sst2", rows, pretrained("dense", "bert"), tokenizer=words))
    (words / "vocab.txt").write_text("\n".join([*pieces[:-2], *pieces[:-3:-1]]) + "\n")
    with pytest.raises(UserError, match=r"was trained with another tokenizer than that of .*tokenizer: give that one with --tokenizer"):
        made(command("sst2", rows, pretrained("dense", "bert"), tokenizer=words))


def test_source_names_its_training(pretrained):  # noqa: F811
    source = open_source(pretrained("dense"))
    assert source.summary == "Words, 4 steps" and len(source.fingerprint) == 64
    assert source.trained["dataset"].keys() == {"name", "title", "fingerprint"} and source.trained["steps"] == 4


def test_a_tokenizer_that_reads_otherwise_is_another_run(rows, pretrained, tmp_path):  # noqa: F811
    """Its vocabulary stays the same. A run of an older version, which did not store its tokens, goes on."""
    words, folder, upper = tiny.write_tokenizer(tmp_path / "tokenizer"), tmp_path / "run", shutil.copytree(rows["sst2"], tmp_path / "rows")
    for path in upper.iterdir():
        head, *lines = path.read_text().split("\n")
        path.write_text("\n".join([head, *map(str.upper, lines)]))
    arguments = command("sst2", {"sst2": upper}, pretrained("dense", "bert"), work_dir=folder, tokenizer=words)
    tiny.completed(arguments, program="finetune.py")
    (words / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    for again in (arguments, ["--eval_only", "--work_dir", str(folder)]):
        run = tiny.run(again, program="finetune.py")
        assert run.code == 2 and "another" in run.err and "tokens_sha256" in run.err, run
    older = documents.read(folder / "config.json", dict, "")
    del older["tokens_sha256"]
    documents.write(folder / "config.json", older)
    again, _ = run_of(arguments)
    assert RunFolder(again.flags, again.fingerprints()).config_sha256 == config_sha256(older)
