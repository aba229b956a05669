"""Adding a router, a model architecture or a fine-tuning task takes one file and one registry line; each is run end to end."""

import ast
import importlib
import inspect
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests import tiny
from tests.conftest import ROOT
from utils.data.rows import TASKS, kind_of
from utils.flags.models import MODELS, Model, presets_of
from utils.models.registry import Architecture, architecture
from utils.tasks.base import Task
from utils.training.run import Callback

ROUTER = '''
"""Learned logits that ignore the token: every token goes to the same experts."""

import torch
from torch import nn

from smoe_dropout.routers import Router, Routing


class ConstantRouter(Router):
    def __init__(self, d_model, config):
        super().__init__(config)
        self.logits = nn.Parameter(torch.linspace(0, 1, config.num_experts))
        self.requires_grad_(not self.freeze)

    def forward(self, x_ND, k):
        top_NK, indices_NK = self.logits.expand(len(x_ND), -1).topk(k, dim=-1)
        return Routing(indices_NK, self.weigh(top_NK), {})
'''

MODEL = '''
"""A GRU over bytes with a feed-forward layer after each recurrent one."""

import torch
import torch.nn.functional as F
from torch import nn

from utils.models.flops import expert_flops

SIZES = ("n_layer", "d_model", "d_ff", "d_inner")


class Layer(nn.Module):
    def __init__(self, width, d_ff):
        super().__init__()
        self.gru, self.norm = nn.GRU(width, width, batch_first=True), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, d_ff), nn.ReLU(), nn.Linear(d_ff, width))

    def forward(self, x_BTD, state_B1D):
        y_BTD, state_1BD = self.gru(x_BTD, None if state_B1D is None else state_B1D.transpose(0, 1).contiguous())
        return x_BTD + self.feed_forward(self.norm(x_BTD + y_BTD)), state_1BD.transpose(0, 1).detach()


class RecurrentLM(nn.Module):
    def __init__(self, flags):
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, flags.d_model), nn.Linear(flags.d_model, 256)
        self.layers = nn.ModuleList(Layer(flags.d_model, flags.d_ff) for _ in range(flags.n_layer))
        self.mem_len = 1  # a recurrent state has no length

    def hidden(self, tokens_BT, state=None):
        x_BTD, states = self.embedding(tokens_BT), []
        for index, layer in enumerate(self.layers):
            x_BTD, after = layer(x_BTD, state[index] if state else None)
            states.append(after)
        return x_BTD, tuple(states)

    def read(self, tokens_BT, state=None, targets_BT=None):
        losses, state, logits = self(tokens_BT, tokens_BT if targets_BT is None else targets_BT, state)
        return logits if targets_BT is None else losses, state

    def forward(self, tokens_BT, targets_BT, state=None):
        hidden, state = self.hidden(tokens_BT, state)
        logits = self.head(hidden).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)
        return losses, state, logits


def build(flags, vocabulary=None):
    return RecurrentLM(flags)


def blocks(model):
    return model.layers


def forward_flops(model, shape, k):
    tokens, width, layers = shape.rows * shape.positions, model.embedding.embedding_dim, len(model.layers)
    targets = shape.rows * (shape.positions if shape.targets is None else shape.targets)
    dense = 4 * width * model.layers[0].feed_forward[0].out_features if hasattr(model.layers[0].feed_forward, "__getitem__") else 0
    return tokens * layers * 12 * width**2 + targets * 2 * width * 256 + expert_flops(model, shape, k, layers, dense)


def hidden_states(model, tokens_NT, lengths_N):
    return model.hidden(tokens_NT)[0]


def summary(hidden_NTD, lengths_N):
    return hidden_NTD[torch.arange(len(lengths_N)), lengths_N - 1]


def without_head(model):
    del model.head
    return model
'''

TASK = '''
"""Three shades of grey, by a word of the text."""

from utils.data.rows import Choice, Kind, table

NAMES = ("light", "medium", "dark")


def rows(file):
    for line, row in table(file, ("text", "shade")):
        if row["shade"] not in NAMES:
            file.refuse(f"line {line}, column shade", "is not a shade")
        yield Choice(((row["text"],),), NAMES.index(row["shade"]))


SHADES = Kind("Shades", ("train.csv", "dev.csv"), ((30, 12),), rows, labels=3)
'''


@dataclass
class Extension:
    """An extension as a user writes it: one file, and one line of a registry, "module:NAME"."""

    folder: Path
    name: str
    content: str
    registry: str
    entry: object

    def __post_init__(self):
        (self.folder / f"{self.name}.py").write_text(self.content)

    def register(self) -> None:
        sys.path.insert(0, str(self.folder))
        module, _, registry = self.registry.partition(":")
        getattr(importlib.import_module(module), registry)[self.name] = self.entry

    @property
    def files(self) -> int:
        """Files touched: its own and the registry's."""
        return len(list(self.folder.glob("*.py"))) + 1


def register(extensions: list[Extension]) -> None:
    for extension in extensions:
        extension.register()


def run(extensions: list[Extension], program: str, arguments: list[str]) -> tiny.Finished:
    """Runs a program in a process whose registries have the added lines."""
    return tiny.run(arguments, partial(register, extensions), program=program)


def result_of(extensions: list[Extension], program: str, arguments: list[str], folder: Path) -> dict:
    done = run(extensions, program, arguments)
    assert done.code == 0, done.err[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory) -> Extension:
    entry = Model(
        *("GRU", ("bytes",), "recurrent", "utils.tasks.language_modelling:LanguageModelling"),
        *("utils.flags.presets:TRANSFORMER_XL", ("mask_rate",)),
    )
    return Extension(tmp_path_factory.mktemp("model"), "recurrent", MODEL, "utils.flags.models:MODELS", entry)


@pytest.fixture(scope="module")
def pretrained(recurrent, words, tmp_path_factory) -> tuple[Path, dict]:
    """A run of the new architecture, and its record."""
    folder = tmp_path_factory.mktemp("runs") / "recurrent"
    arguments = tiny.flags(words, folder, model="recurrent", method="smoe_dropout", lr=1e-2)
    return folder, result_of([recurrent], "train.py", arguments, folder)


def test_a_router_is_one_file_and_one_line(words, tmp_path):
    (tmp_path / "extension").mkdir()
    router = Extension(tmp_path / "extension", "constant", ROUTER, "smoe_dropout.registry:ROUTERS", "constant:ConstantRouter")
    arguments = tiny.flags(words, tmp_path / "run", moe=True, gate_name="constant")
    result = result_of([router], "train.py", arguments, tmp_path / "run")
    assert router.files == 2
    assert result["model"]["router"] == "constant" and result["routing"]["fluctuation"] == 0
    assert result["parameters"]["router"] == 2 * 4 and [row["k"] for row in result["quality"]] == [1, 2, 4]


def test_a_model_is_one_file_and_one_line(recurrent, pretrained):
    folder, result = pretrained
    assert recurrent.files == 2
    assert result["model"]["n_layer"] == 2 and result["model"]["num_experts"] == 4
    assert [row["k"] for row in result["quality"]] == [1, 2, 4] and all(0 < row["test"] < 8 for row in result["quality"])
    losses = [line["loss"] for line in tiny.metrics(folder, "train")]
    assert losses[-1] < losses[0] - 1


def test_a_task_is_one_file_and_one_line(recurrent, pretrained, tmp_path):
    """Fine-tuned from the new architecture."""
    (tmp_path / "extension").mkdir()
    task = Extension(tmp_path / "extension", "shades", TASK, "utils.data.rows:TASKS", "shades:SHADES")
    rows = tmp_path / "rows"
    rows.mkdir()
    for name, count in (("train.csv", 30), ("dev.csv", 12)):
        lines = [f"{'a ' * (n % 5)}{shade},{shade}" for n in range(count) for shade in [("light", "medium", "dark")[n % 3]]]
        (rows / name).write_text("\n".join(["text,shade", *(f"{n} {line}" for n, line in enumerate(lines, len(name)))]) + "\n")
    arguments = ["--task", "shades", "--checkpoint", str(pretrained[0]), "--data", str(rows), "--work_dir", str(tmp_path / "run")]
    sizes = {"max_step": 60, "eval_interval": 60, "log_interval": 20, "batch_size": 6, "lr": 1e-2, "warmup_step": 0}
    arguments += [word for name, value in sizes.items() for word in (f"--{name}", str(value))] + ["--device", "cpu", "--threads", "1"]
    result = result_of([task, recurrent], "finetune.py", arguments, tmp_path / "run")
    assert task.files == 2
    assert result["dataset"]["title"] == "Shades" and result["dataset"]["rows"] == {"train": 30, "dev": 12}
    assert (result["metric"]["name"], result["table"]) == ("accuracy", "table2")
    assert [row["k"] for row in result["quality"]] == [1, 2, 4] and result["quality"][-1]["dev"] > 50
    (rows / "dev.csv").write_text("text,shade\na,blue\n")
    refused = run([task, recurrent], "finetune.py", [*arguments[:-1], "2"])
    assert refused.code == 2 and "line 2, column shade" in refused.err


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_defines_what_the_protocol_says(name):
    module, presets = architecture(name), presets_of(name)
    for member, wanted in vars(Architecture).items():
        if isinstance(wanted, staticmethod):
            found = inspect.signature(getattr(module, member)).parameters
            assert list(found) == list(inspect.signature(wanted.__func__).parameters), f"{module.__name__}.{member}"
    assert module.SIZES and all(isinstance(size, str) for size in module.SIZES)
    assert {"paper", "laptop", "quick"} <= presets.keys()


@pytest.mark.parametrize("name", TASKS)
def test_a_registered_task_has_files_counts_and_a_task(name):
    kind = kind_of(name)
    module, _, attribute = kind.task.partition(":")
    assert callable(getattr(__import__(module, fromlist=[attribute]), attribute))
    assert kind.folds >= 1 and all(len(counts) == 2 for counts in kind.counts) and kind.split in ("dev", "test")


def test_interfaces_are_small():
    """A task defines batches, loss and metric; a callback has hooks only."""
    assert len([name for name in vars(Task) if not name.startswith("_")]) <= 12
    assert len([name for name in vars(Callback) if not name.startswith("_")]) <= 12


def imported(folder: str) -> set[str]:
    """Rooms of utils that the files of a room import, except for type checking only."""
    found = set()
    for path in (ROOT / "utils" / folder).rglob("*.py"):
        tree = ast.parse(path.read_text())
        typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        skipped = {id(inner) for node in typing for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and id(node) not in skipped and node.module.startswith("utils."):
                found.add(node.module.split(".")[1])
    return found - {folder}


def test_models_tasks_and_training_import_one_way():
    assert not imported("models") & {"tasks", "training", "reporting", "cli"}
    assert not imported("tasks") & {"training", "reporting", "cli"}
    assert not imported("training") & {"reporting", "cli"}
