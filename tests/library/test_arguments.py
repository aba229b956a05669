"""Every argument of every public function: a value that is not meant is refused in one sentence before anything is changed."""

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import smoe_dropout as sd
from tests.library.test_misuse import D, config, model

ODD = {
    "None": None,
    "True": True,
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "2.5": 2.5,
    "huge": 10**400,
    "'2'": "2",
    "''": "",
    "[]": [],
    "{}": {},
    "int64(2)": np.int64(2),
    "float32(2)": np.float32(2),
    "bool_": np.bool_(True),
    "tensor": torch.tensor(2),
    "object": object(),
}
COUNT = {"int64(2)"}
OPTIONAL = {*COUNT, "None"}
ANY_COUNT = {*COUNT, "huge"}
SEED = {*COUNT, "-1", "0"}
NUMBER = {"0", "2.5", "int64(2)", "float32(2)"}
TRUTH = {"True", "bool_"}

SPARSE = sd.moefy(model(), config(router="learned"))
META = sd.moefy(model(), config(router="learned")).to("meta")


def passes() -> list:
    return [(lambda: SPARSE[0]["ffn"](torch.ones(50, D) * torch.linspace(-1, 1, 50)[:, None]), None)]


CALIBRATION = sd.calibrate(SPARSE, passes(), k=4)
SCHEDULE = {"mode": "linear_increase", "k_min": 2, "k_max": 4, "total_steps": 10, "seed": 0}
NOT_A_MODEL = ("model", object(), set())


def scheduled(step=1, **settings) -> int:
    return sd.TopKSchedule(**settings)(step)


def entered(manager):
    return lambda *arguments, **named: manager(*arguments, **named).__enter__()


def operated(method: str, **options):
    return lambda **given: sd.operate(**{"model": SPARSE, "method": method, "keep": 2, "calibration": CALIBRATION, **options, **given})


# function, further arguments, and the odd values that each argument accepts
ARGUMENTS = {
    "SMoEConfig": (
        sd.SMoEConfig,
        {},
        {field.name: set() for field in fields(sd.SMoEConfig)}
        | {"num_experts": set(), "d_expert": OPTIONAL, "expert_rank": OPTIONAL, "top_k": COUNT, "freeze_router": {*TRUTH, "None", "0"}}
        | {"balance_loss": {*NUMBER, "None"}, "init_std": NUMBER - {"0"}, "options": {"{}"}, "sites": {"None", "'2'"}}
        | {"shared_experts": {*COUNT, "0"}}
        | {name: {"None"} for name in ("layers", "experts_by_layer", "top_k_by_layer", "method", "adopted")},
    ),
    "exact": (sd.SMoEConfig.exact, {}, {"num_experts": COUNT}),
    "from_dict": (sd.SMoEConfig.from_dict, {}, {"values": {"{}"}}),
    "from_json": (sd.SMoEConfig.from_json, {}, {"text": set()}),
    "TopKSchedule": (
        scheduled,
        SCHEDULE,
        {"mode": set(), "k_min": COUNT, "k_max": COUNT, "total_steps": ANY_COUNT, "seed": {*SEED, "huge"}, "step": {*ANY_COUNT, "0"}},
    ),
    "elastic": (scheduled, SCHEDULE | {"mode": "elastic"}, {"total_steps": ANY_COUNT, "seed": {*SEED, "huge"}, "step": {*ANY_COUNT, "0"}}),
    "moefy": (sd.moefy, {"model": SPARSE, "config": config()}, {"model": set(), "config": set()}),
    "adopt": (sd.adopt, {}, {"model": set()}),
    "report": (sd.report, {"model": SPARSE}, {"model": set(), "config": {"None"}}),
    "unmoefy": (sd.unmoefy, {}, {"model": set()}),
    "set_top_k": (sd.set_top_k, {"model": SPARSE, "k": 2}, {"model": set(), "k": {*COUNT, "{}"}}),
    "get_top_k": (sd.get_top_k, {}, {"model": set()}),
    "top_k": (entered(sd.top_k), {"model": SPARSE, "k": 2}, {"model": set(), "k": {*COUNT, "{}"}}),
    "freeze_routers": (sd.freeze_routers, {"model": SPARSE}, {"model": set(), "frozen": TRUTH}),
    "moe_layers": (sd.moe_layers, {}, {"model": set()}),
    "auxiliary_loss": (sd.auxiliary_loss, {}, {"model": set()}),
    "expert_load": (sd.expert_load, {}, {"model": set()}),
    "token_mask": (entered(sd.token_mask), {"model": SPARSE, "mask": torch.ones(2, 3)}, {"model": set(), "mask": set()}),
    "parameter_groups": (sd.parameter_groups, {"model": SPARSE, "weight_decay": 0.1}, {"model": set(), "weight_decay": NUMBER}),
    "set_progress": (
        sd.set_progress,
        {"model": SPARSE, "step": 0, "total_steps": 9},
        {"model": set(), "step": {*ANY_COUNT, "0"}, "total_steps": ANY_COUNT},
    ),
    "method_metrics": (sd.method_metrics, {}, {"model": set()}),
    "slim": (sd.slim, {"model": SPARSE, "k": 2}, {"model": set(), "k": {*COUNT, "{}"}, "dtype": {"None"}, "copy": TRUTH}),
    "calibrate": (
        lambda **given: sd.calibrate(**{"model": SPARSE, "passes": passes(), "k": 4, **given}),
        {},
        {"model": set(), "passes": set(), "k": OPTIONAL, "seed": SEED, "sample": COUNT},
    ),
    "merge": (operated("merge"), {}, {"model": set(), "method": set(), "keep": COUNT, "calibration": set(), "by_layer": TRUTH}),
    "keep_best": (operated("keep_best", keep=2), {}, {"keep": COUNT, "calibration": set(), "score": set()}),
    "uncurl": (operated("uncurl"), {}, {"seed": SEED}),
    "compress": (sd.compress, {"model": SPARSE, "rank": 2}, {"model": set(), "rank": COUNT, "kept": set()}),
    "Pruner": (
        sd.Pruner,
        {"model": sd.compress(SPARSE, 2), "kept": 0.5, "steps": 10},
        {"model": set(), "kept": set(), "steps": ANY_COUNT},
    ),
    "save_model": (sd.save_model, {"model": SPARSE, "folder": "new"}, {"model": set(), "folder": {"'2'"}}),
    "load_weights": (sd.load_weights, {"model": SPARSE, "folder": "nothing"}, {"model": set(), "folder": set()}),
    "from_official": (sd.from_official, {}, {"tensors": {"{}"}}),
    "to_official": (sd.to_official, {}, {"tensors": {"{}"}}),
    "Calibration": (sd.Calibration.load, {}, {"path": set()}),
    "MoELayer": (
        sd.MoELayer,
        {"d_model": D, "experts": SPARSE[0]["ffn"].experts, "config": config()},
        {"d_model": COUNT, "experts": set(), "config": set()},
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_odd_arguments(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, given, accepted = ARGUMENTS[name]
    state = {key: tensor.clone() for key, tensor in SPARSE.state_dict().items()}
    for argument, values in accepted.items():
        for label, value in ODD.items():
            if label in values:
                function(**{**given, argument: value})
                continue
            with pytest.raises(sd.ConfigError) as refused:
                function(**{**given, argument: value})
            assert "\n" not in str(refused.value), (argument, label)
    assert all(torch.equal(tensor, state[key]) for key, tensor in SPARSE.state_dict().items())


@pytest.mark.parametrize("name", ["save_pretrained", "from_pretrained", "TopKScheduleCallback"])
def test_odd_arguments_with_transformers(name, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(
        ARGUMENTS,
        name,
        {
            "save_pretrained": (sd.save_pretrained, {"folder": "new"}, {"model": set()}),
            "from_pretrained": (lambda source: sd.from_pretrained(Path("a/b/c") if source == "2" else source), {}, {"source": set()}),
            "TopKScheduleCallback": (
                sd.TopKScheduleCallback,
                {"mode": "constant", "k_min": 2, "k_max": 4},
                {"mode": set(), "k_min": COUNT, "k_max": COUNT, "seed": {*SEED, "huge"}}
                | {"total_steps": {*ANY_COUNT, "None"}, "evaluate_at": OPTIONAL},
            ),
        }[name],
    )
    test_odd_arguments(name, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda: sd.save_model(META, "new"), "on the meta device and has no values"),
        (lambda: sd.load_weights(META, "new"), "on the meta device and has no values"),
        (lambda: sd.calibrate(META, passes()), "on the meta device and has no values"),
        (lambda: sd.operate(META, "merge", 2, CALIBRATION), "on the meta device and has no values"),
        (lambda: sd.compress(META, 2), "on the meta device and has no values"),
        (lambda: sd.calibrate(SPARSE, [(passes()[0][0], torch.ones(50, dtype=torch.int64))]), r"is a torch\.int64: it must be a bool"),
        (lambda: sd.calibrate(SPARSE, [passes()[0][0]]), "must be a pair"),
        (lambda: sd.calibrate(SPARSE, [(lambda: SPARSE[0]["ffn"](torch.full((9, D), math.nan)), None)]), "not finite"),
        (lambda: sd.operate(diverged(), "keep_best", 2, None, score="router_norm"), "not finite: the training has diverged"),
        (lambda: sd.compress(diverged(), 2), "not finite: the training has diverged"),
        (lambda: sd.moefy(model(), config(num_experts=2**31 - 1, d_expert=2**31 - 1)), "are experts of .* parameters"),
        (lambda: sd.moefy(model(), config(router="logit_drop", options={"logit_dropout": math.nan})), "must be a finite number"),
        (lambda: sd.moefy(model(), config(router="logit_drop", options={"logit_dropout": True})), "must be a finite number"),
        (lambda: sd.moefy(model(), config(router="scored", options={"groups": 10**400})), "must be a whole number"),
        (lambda: SPARSE[0]["ffn"](torch.ones(2, D, dtype=torch.complex64)), "in floating point"),
        (lambda: sd.from_official({"a": 1}), "'a' is not a tensor"),
        (lambda: sd.to_official({"layers.0.feed_forward.core.experts.down": torch.ones(2)}), "maps of experts are stacked"),
    ],
)
def test_no_silent_wrong_number(use, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((sd.ConfigError, TypeError), match=words):
        use()
    assert not list(tmp_path.iterdir())


def diverged() -> nn.Module:
    made = sd.moefy(model(), config(router="learned"))
    with torch.no_grad():
        made[0]["ffn"].router.weight[0, 0] = math.nan
    return made


def test_numbers_of_numpy_are_stored_as_pythons_own():
    given = sd.SMoEConfig(np.int64(4), np.int32(2), balance_loss=np.float32(0.5), router="learned", freeze_router=np.bool_(True))
    assert sd.SMoEConfig.from_json(given.to_json()) == sd.SMoEConfig(4, 2, balance_loss=0.5, router="learned", freeze_router=True)
