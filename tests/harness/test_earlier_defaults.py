"""Runs begun before a default changed keep it when they are resumed; and both readings of what a paper leaves open can be run."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import tiny
from tests.harness.test_finetune import command, pretrained, rows, run_of  # noqa: F401 (fixtures)
from utils import documents
from utils.checkpoints.origin import open_source
from utils.checkpoints.run_files import config_of, config_sha256
from utils.cli.finetune import parse
from utils.flags.derive import built_options, smoe_config
from utils.models.build import build_model
from utils.training.identity import departures_of, training_of
from utils.training.optimizer import build_optimizer
from utils.training.run_folder import RunFolder

SHORT = {"n_layer": 1, "max_step": 8, "log_interval": 2, "eval_interval": 4}


def flags(text: str):
    return tiny.parse(text.split())


def interrupted(run: Path) -> None:
    """As if an earlier version had begun the run and been stopped before its end."""
    config = tiny.read_json(run / "config.json")
    assert config.pop("defaults") == "earlier"
    documents.write(run / "config.json", config)
    (run / "result.json").unlink()
    shutil.rmtree(tiny.checkpoints(run)[-1])


def test_a_run_of_an_earlier_version_is_resumed_as_it_began(tmp_path):
    words = tiny.write_corpus(tmp_path / "words")
    arguments = {name: tiny.flags(words, tmp_path / name, method="competesmoe", **SHORT) for name in ("whole", "broken", "new")}
    tiny.completed([*arguments["whole"], "--defaults", "earlier"])
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    interrupted(tmp_path / "broken")
    said = tiny.completed(arguments["broken"]).err
    assert f"note: {tmp_path / 'broken'} was begun by an earlier version, so it keeps --defaults earlier" in said
    tiny.same_run(tmp_path / "broken", tmp_path / "whole")
    source, settings = open_source(tmp_path / "broken"), tiny.read_json(tmp_path / "broken" / "result.json")["settings"]
    assert settings == training_of(source)["settings"] == {"moe_num_expert": 4, "defaults": "earlier"}
    assert source.flags["defaults"] == "earlier" and built_options(source.made)[0].flip_rate == 0.03
    new = tiny.parse(arguments["new"])
    assert built_options(new)[0].flip_rate == 1.0 and config_sha256(config_of(new, {})) != config_sha256(config_of(source.made, {}))


def test_a_fine_tuning_of_an_earlier_version_keeps_dropout_twice(rows, pretrained, tmp_path, capsys):  # noqa: F811
    arguments = command("sst2", rows, pretrained("dense"), work_dir=tmp_path / "run")
    config = config_of(parse(arguments)[0], {})
    assert (config.pop("head_dropout"), config.pop("moe_prune_by")) == ("once", "rows")
    (tmp_path / "run").mkdir()
    documents.write(tmp_path / "run" / "config.json", config)
    begun, source = parse(arguments)
    assert begun.head_dropout == "twice" and "so it keeps --head_dropout twice" in capsys.readouterr().err
    assert RunFolder(begun, {}).config_sha256 == config_sha256(config)  # the run's own identity
    assert begun.moe_prune_by == "units"  # which has no effect without pruning, and is no setting of its own
    assert departures_of(begun, source)[1] == {"head_dropout": "twice"}


@pytest.mark.parametrize(("head_dropout", "times"), [(None, 1), ("twice", 2)])
def test_dropout_acts_once_before_the_head(head_dropout, times, rows, pretrained, tmp_path):  # noqa: F811
    """With a rate of 1/2 and all hidden states 1, every value is 0 or 2, after two dropouts 0 or 4."""
    changes = {"dropout": 0.5, "head_dropout": head_dropout, "work_dir": tmp_path / "run"}
    run, scorer = run_of(command("sst2", rows, pretrained("dense"), **changes))
    seen, scorer = [], run.engine.prepare(scorer).train()
    scorer.head[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    scorer.backbone.layers[-1].register_forward_hook(lambda module, inputs, output: torch.ones_like(output))
    for _ in range(20):
        scorer(*run.task.training_batch(0).inputs)
    assert torch.cat(seen).unique().tolist() == [0.0, 2.0**times]
    assert {name for name, _ in scorer.head.named_parameters()} == {"1.weight", "1.bias", "4.weight", "4.bias"}  # as in earlier versions


def test_official_gates_have_the_settings_of_the_official_code():
    run = flags("--moe --gate_name CustomNaiveGate_Balance")
    assert (run.gate_name, run.load_balance, run.method) == ("learned", 0.0, "smoe")
    assert flags("--moe --gate_name CustomNaiveGate_Balance --load_balance 0.01").load_balance == 0.01
    assert flags("--method smoe").load_balance is None  # the router's 0.01
    noisy = flags("--moe --gate_name NoisyGate --preset quick")
    assert (noisy.gate_name, noisy.load_balance) == ("noisy_top_k", 0.0)
    assert smoe_config(noisy).options == {"noise_epsilon": "0.01", "gate_init": "kaiming"}
    assert smoe_config(flags("--moe --gate_name noisy_top_k")).options == {}
    given = flags("--moe --gate_name NoisyGate --method_options noise_epsilon=0.5")
    assert smoe_config(given).options == {"noise_epsilon": "0.5", "gate_init": "kaiming"}


BOTH = {
    "SMoE at E/2": ("--method smoe", {"moe_top_k": 8}),
    "SMoE as official": ("--method smoe --moe_top_k 2", {"moe_top_k": 2}),
    "SMoE-Dropout as official": ("--method smoe_dropout", {"dropout": 0.1}),
    "SMoE-Dropout without dropout": ("--method smoe_dropout --dropout 0", {"dropout": 0.0}),
}


@pytest.mark.parametrize("name", BOTH)
def test_both_readings_of_a_baseline_can_be_run(name):
    text, expected = BOTH[name]
    run = flags(text)
    assert {field: getattr(run, field) for field in expected} == expected


@pytest.mark.parametrize(("options", "blocks"), [("", 16), (" --method_options blocks=64", 64)])
def test_block_dropout_has_16_or_the_official_64_blocks(options, blocks):
    run = flags(f"--method block_dropout --preset quick{options}")
    model = build_model(run).train()
    dropout = next(module for module in model.modules() if type(module).__name__ == "BlockDropout")
    dropout.inner = nn.Identity()
    hidden = dropout(torch.ones(200, 512)).unflatten(-1, (blocks, -1))
    assert torch.equal(hidden.amin(-1), hidden.amax(-1)) and dropout.options.blocks == blocks


@pytest.mark.parametrize("decayed", ["all", "matrices"])
def test_weight_decay_acts_on_all_or_on_matrices_only(decayed):
    """Without gradients the step of AdamW is the decay alone: p (1 - lr decay)."""
    run = flags(f"--model bert --preset quick --method smoe --optim adamw --lr 0.5 --weight_decay 0.2 --decayed {decayed} --device cpu")
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(model, run).step()
    found = {name: float(parameter.detach().mean()) for name, parameter in model.named_parameters()}
    others = 0.9 if decayed == "all" else 1.0
    assert found == pytest.approx({"0.weight": 0.9, "0.bias": others, "1.weight": others, "1.bias": others})
