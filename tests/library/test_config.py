"""SMoEConfig reports every mistake, registries suggest close names, and neither imports torch."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import smoe_dropout as sd
from smoe_dropout import registry
from tests.conftest import ROOT


class Mine:
    """A router's class, passed instead of its name."""

    def __repr__(self):  # the same in every process, for the names of tests
        return "<Mine>"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_experts": 0}, ["num_experts = 0"]),
        ({"num_experts": True}, ["num_experts = True"]),
        ({"num_experts": 2.0}, ["num_experts = 2.0"]),
        ({"num_experts": 4, "top_k": 5}, ["top_k = 5", "num_experts = 4"]),
        ({"top_k": 0}, ["top_k = 0"]),
        ({"top_k": 1.5}, ["top_k = 1.5"]),
        ({"num_experts": 0, "top_k": -1}, ["num_experts = 0", "top_k = -1"]),
        ({"d_expert": 0}, ["d_expert = 0"]),
        ({"router": "randon"}, ["'randon'", "nearest: random"]),
        ({"router": "CustomNaiveGat"}, ["nearest: CustomNaiveGate"]),
        ({"router": 5}, ["router", "5"]),
        ({"router": Mine}, ["router is the class Mine: register it, registry.ROUTERS['name'] = 'tests.library.test_config:Mine'", "pass"]),
        ({"router": Mine()}, ["router = <", "must be a registered name: random"]),
        ({"method": SimpleNamespace(name="thor")}, ["method is a SimpleNamespace: pass its name, method = 'thor'"]),
        ({"backend": "sort"}, ["'sort'", "sorted"]),
        ({"backend": None}, ["backend", "None"]),
        ({"gate_weight": "soft"}, ["gate_weight 'soft'", "softmax"]),
        ({"output_scale": "sum"}, ["output_scale 'sum'", "mean, dense"]),
        ({"expert_init": "splitt"}, ["expert_init 'splitt'", "split"]),
        ({"balance_loss": -0.1}, ["balance_loss = -0.1"]),
        ({"balance_loss": math.nan}, ["balance_loss = nan"]),
        ({"balance_loss": math.inf}, ["balance_loss = inf"]),
        ({"balance_loss": "much"}, ["balance_loss = 'much'"]),
        ({"init_std": 0}, ["init_std = 0"]),
        ({"init_std": math.inf}, ["init_std = inf"]),
        ({"init_std": "small"}, ["init_std = 'small'"]),
        ({"freeze_router": "no"}, ["freeze_router = 'no'"]),
        ({"layers": ()}, ["layers is empty"]),
        ({"layers": (True,)}, ["layers names True"]),
        ({"layers": (1, 0, 1, 0)}, ["0, 1 more than once"]),
        ({"layers": (1.5,)}, ["layers names 1.5"]),
        ({"layers": 3}, ["layers", "3"]),
        ({"expert_init": "copy", "output_scale": "dense"}, ["copy", "output_scale = 'mean'"]),
        ({"expert_init": "split", "d_expert": 4}, ["d_expert = 4", "'split'"]),
        ({"expert_init": "copy", "d_expert": 4}, ["d_expert = 4", "'copy'"]),
        ({"top_k": 99, "router": "x", "backend": "y", "init_std": -1, "layers": ()}, ["top_k", "router", "backend", "init_std", "layers"]),
    ],
    ids=str,
)
def test_config_reports_every_mistake(settings, words):
    with pytest.raises(sd.ConfigError) as error:
        sd.SMoEConfig(**settings)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    "settings",
    [{}, {"layers": (0, 2), "d_expert": 7, "balance_loss": 0.5, "freeze_router": False}, {"router": "NaiveGate"}, {"layers": [1, 3]}],
    ids=str,
)
def test_config_round_trips_through_json(settings):
    config = sd.SMoEConfig(**settings)
    assert sd.SMoEConfig.from_json(config.to_json()) == config and hash(config)
    assert set(json.loads(config.to_json())) == set(sd.SMoEConfig.__dataclass_fields__)


def test_exact_configuration():
    exact = sd.SMoEConfig(num_experts=8, top_k=8, expert_init="split", gate_weight="uniform", output_scale="dense")
    assert sd.SMoEConfig.exact(8) == exact
    assert sd.SMoEConfig.exact(8, top_k=4, layers=(1,)) == replace(exact, top_k=4, layers=(1,))


def test_numbers_and_lists_of_other_libraries_become_pythons():
    given = sd.SMoEConfig(np.int64(4), np.int32(2), layers=np.arange(2).tolist(), balance_loss=np.float32(0.5), d_expert=np.int8(3))
    assert given == sd.SMoEConfig(4, 2, layers=[np.int64(0), np.int64(1)], balance_loss=0.5, d_expert=3)
    assert sd.SMoEConfig.from_json(given.to_json()) == given and sd.SMoEConfig(layers=range(-2, 0)).layers == (-2, -1)


def test_config_rejects_unknown_fields():
    with pytest.raises(sd.ConfigError, match=r"unknown field expert, k in .* known: .*num_experts"):
        sd.SMoEConfig.from_dict({"k": 1, "expert": 2, "top_k": 3})


@pytest.mark.parametrize(
    ("official", "router", "balance"),
    [("CustomNaiveGate", "random", None), ("NaiveGate", "learned", 0.0), ("CustomNaiveGate_Balance", "learned", 0.0)],
)
def test_official_router_names(official, router, balance):
    config = sd.SMoEConfig(router=official)
    assert (config.router, config.balance_loss) == (router, balance)
    assert sd.SMoEConfig(router=official, balance_loss=0.3).balance_loss == 0.3  # an explicit value takes precedence


# names


@pytest.mark.parametrize("name", ["ROUTERS", "BACKENDS", "METHODS", "HOSTS", "INTEGRATIONS", "CUTS", "SURGERIES"])
def test_registries(name):
    entries = getattr(registry, name)
    for known in entries:
        assert registry.load(entries, "thing", known) is not None
        with pytest.raises(KeyError, match=f"unknown thing '{known}x'; nearest: .*{known}"):
            registry.load(entries, "thing", known + "x")
    with pytest.raises(KeyError, match=f"known: {', '.join(entries)}"):
        registry.load(entries, "thing", "@@@")


def test_import_needs_no_torch_and_provides_all_exports():
    code = (
        "import sys, smoe_dropout as sd, smoe_dropout.registry\n"
        "sd.SMoEConfig(); sd.TopKSchedule('linear_increase', 8, 16, 10)(3); dir(sd)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert all(getattr(sd, name) is not None and name in dir(sd) for name in sd.__all__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with pytest.raises(AttributeError, match="moefi"):
        _ = sd.moefi
