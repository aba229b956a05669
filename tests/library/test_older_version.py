"""Folders saved by version 0.1 load, with the weights stored in them and the outputs recorded beside them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import smoe_dropout as sd

DATA = Path(__file__).parent / "data" / "saved-0.1"
RECORDED = load_file(DATA / "outputs.safetensors")
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}  # matrix products may round differently on another CPU


def assert_weights(model: nn.Module, path: Path) -> None:
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in load_file(path).items())


def test_save_pretrained_folder():
    pytest.importorskip("transformers")
    model = sd.from_pretrained(DATA / "bert")
    assert_weights(model, DATA / "bert" / "experts.safetensors")
    assert sd.get_top_k(model) == 3 and not any(p.requires_grad for _, layer in sd.moe_layers(model) for p in layer.router.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(RECORDED["tokens"]).logits, RECORDED["logits"], **TOLERANCE)


def test_save_model_folder():
    torch.manual_seed(1)
    model = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))
    sd.moefy(model, sd.SMoEConfig(num_experts=4, top_k=2, gate_weight="uniform"))
    sd.load_weights(model, DATA / "model")
    assert_weights(model, DATA / "model" / "model.safetensors")
    y = RECORDED["x"]
    with torch.no_grad():
        for layer in model.eval():
            y = y + layer(y)
    torch.testing.assert_close(y, RECORDED["y"], **TOLERANCE)
