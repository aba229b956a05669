"""Agreement with vectors computed by the official implementation, in REFERENCE_DIR; names and sizes are read from the files."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import smoe_dropout as sd
from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout.routers import RandomRouter
from tests.conftest import REFERENCE

MODEL_KEYS = ("n_token", "n_layer", "n_head", "d_model", "d_head", "d_inner", "mem_len", "pre_lnorm", "same_length", "clamp_len")


def metadata(path, key):
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get(key, "null"))


def find(wanted):
    """Files with a model configuration that contain the tensor `wanted`."""
    found = []
    for path in sorted(REFERENCE.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if "config" in (file.metadata() or {}) and wanted in file.keys():  # noqa: SIM118 (not a dict)
                found.append(path)
    return found


def build(config, tensors, backend="auto"):
    """Build the model of a reference file from its configuration and weights."""
    model = MemTransformerLM(TransformerXLConfig(dropout=0.0, **{key: config[key] for key in MODEL_KEYS if key in config}))
    if config["moe"]:
        layers = tuple(config["moe_index"]) if config.get("moe_index") is not None else None
        smoe = sd.SMoEConfig(config["num_expert"], config["top_k"], config["d_inner"], layers=layers, backend=backend)
        sd.moefy(model, smoe)
    weights = sd.from_official({name.removeprefix("param."): tensor for name, tensor in tensors.items() if name.startswith("param.")})
    expected = {name for name in model.state_dict() if not name.endswith("_extra_state")} - {"head.weight"}  # k, tied
    assert weights.keys() == expected
    model.load_state_dict({**weights, "head.weight": weights["embedding.weight"]})
    return model


def segments(tokens, tgt_len):
    """[n * tgt_len + 1, batch] -> (inputs, targets) [batch, tgt_len] in order."""
    for begin in range(0, len(tokens) - tgt_len, tgt_len):
        yield tokens[begin : begin + tgt_len].t(), tokens[begin + 1 : begin + tgt_len + 1].t()


MODEL_FILES = find("input.tokens")
CURVE_FILES = find("input.stream")


def test_reference_files_exist():
    assert MODEL_FILES and CURVE_FILES and (REFERENCE / "top_k_schedules.json").exists()


@pytest.mark.parametrize("backend", ["auto", "reference", "sorted", "masked", "grouped"])
@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_losses_memory_and_gradients(path, backend):
    config, tensors = metadata(path, "config"), load_file(path)
    if not config["moe"] and backend != "auto":
        pytest.skip("a dense model has no experts to compute")
    if backend == "grouped" and (config["d_inner"] % 4 or config["d_model"] % 4):
        pytest.skip("grouped_mm wants rows of a multiple of 16 bytes")
    for k in metadata(path, "ks") if config["moe"] else [0]:
        model = build(config, tensors, backend)
        if k:
            sd.set_top_k(model, k)
            sd.freeze_routers(model, False)  # the official run did not freeze the router here
        memory, total = None, 0.0
        for index, (inputs, targets) in enumerate(segments(tensors["input.tokens"], config["tgt_len"])):
            losses, memory, _ = model(inputs, targets, memory)
            expected = tensors[f"k{k}.segment{index}.loss_per_token"].t()
            torch.testing.assert_close(losses, expected, atol=2e-6, rtol=0, msg=lambda text, k=k, i=index: f"k={k} segment {i}: {text}")
            total = total + losses.mean()
        torch.testing.assert_close(memory[-1], tensors[f"k{k}.last_mem_top"].transpose(0, 1), atol=1e-5, rtol=1e-5)
        check_gradients(model, total, {n: t for n, t in tensors.items() if n.startswith(f"k{k}.grad.")}, f"k{k}.grad.")


def check_gradients(model, total, expected, prefix):
    assert expected, f"no tensor {prefix}* in the file"
    total.backward()
    ours = dict(model.named_parameters())
    for name, gradient in sd.from_official({name.removeprefix(prefix): tensor for name, tensor in expected.items()}).items():
        error = (ours[name].grad - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{prefix}{name}: relative error {error:.2e}"


@pytest.mark.parametrize("path", CURVE_FILES, ids=lambda path: path.stem)
def test_training_curve(path):
    config, tensors = metadata(path, "config"), load_file(path)
    steps = len(tensors["loss"])
    model = build(config, tensors)
    experts = config["num_expert"]
    schedule = sd.TopKSchedule("linear_increase", experts // 2, experts, steps)
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=2.5e-3)
    memory = None
    for step, (inputs, targets) in enumerate(segments(tensors["input.stream"], config["tgt_len"])):
        if step == steps:
            break
        assert schedule(step) == tensors["top_k"][step]
        sd.set_top_k(model, schedule(step))
        optimizer.param_groups[0]["lr"] = 2.5e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        losses, memory, _ = model(inputs, targets, memory)
        assert abs(losses.mean().item() - tensors["loss"][step].item()) < 1e-4, f"step {step}"
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
    assert step + 1 >= steps, "the stream is too short for the curve"
    final = sd.from_official({name.removeprefix("final."): tensor for name, tensor in tensors.items() if name.startswith("final.")})
    for name, tensor in final.items():
        error = (model.state_dict()[name] - tensor).norm() / tensor.norm().clamp(min=1e-6)
        assert error < 1e-3, f"{name}: relative error {error:.2e}"
        if ".router." in name:
            assert torch.equal(model.state_dict()[name], tensor), f"{name} must not move"


def test_schedules():
    cases = json.loads((REFERENCE / "top_k_schedules.json").read_text())
    assert cases
    for case, values in cases.items():
        mode, total, low, high = case.split("/")
        schedule = sd.TopKSchedule(mode, int(low), int(high), int(total))
        assert {step: schedule(int(step)) for step in values} == values, case


def test_router():
    tensors = load_file(REFERENCE / "router.safetensors")
    experts, width = tensors["weight"].shape
    router = RandomRouter(width, sd.SMoEConfig(experts, 1))
    router.load_state_dict({"weight": tensors["weight"], "bias": tensors["bias"]})
    ks = sorted(int(name[1:].split(".")[0]) for name in tensors if name.endswith(".index_sorted"))
    assert ks
    for k in ks:
        routing = router(tensors["x"], k)
        order = routing.indices_NK.argsort(-1)
        assert torch.equal(routing.indices_NK.gather(1, order), tensors[f"k{k}.index_sorted"])
        torch.testing.assert_close(routing.weights_NK.gather(1, order), tensors[f"k{k}.score_sorted"], atol=1e-6, rtol=1e-5)
