"""Converted models in torch.export, ONNX, torch.func and quantisation."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.func import functional_call, grad, vmap

import smoe_dropout as sd

GPT2 = {"vocab_size": 31, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 32, "n_positions": 20, "bos_token_id": 0, "eos_token_id": 0}
TOKENS = torch.randint(3, 31, (2, 9), generator=torch.Generator().manual_seed(1))
OTHERS = torch.randint(3, 31, (5, 6), generator=torch.Generator().manual_seed(2))
DYNAMIC = {"tokens": {0: Dim("batch", min=2, max=16), 1: Dim("sequence", min=2, max=20)}}


class Logits(nn.Module):
    """A model of transformers that returns a tensor: its classes for outputs are unknown where the program is loaded."""

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        self.model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, use_cache=False))
        sd.moefy(self.model, sd.SMoEConfig(4, 2, init_std=0.3))
        self.eval()

    def forward(self, tokens):
        return self.model(tokens, return_dict=False)[0]


@pytest.fixture(scope="module")
def exported() -> tuple[torch.export.ExportedProgram, list[torch.Tensor]]:
    """A language model at k = 3 as a program, and its outputs."""
    model = Logits()
    with sd.top_k(model, 3):
        return torch.export.export(model, (TOKENS,), dynamic_shapes=DYNAMIC), [model(tokens).detach() for tokens in (TOKENS, OTHERS)]


def test_exported_program_needs_only_torch(exported, tmp_path):
    """In a process without this library, at other sizes than exported."""
    torch.export.save(exported[0], tmp_path / "program.pt2")
    torch.save(list(zip((TOKENS, OTHERS), exported[1], strict=True)), tmp_path / "outputs.pt")
    code = "import sys, torch; program = torch.export.load('program.pt2').module()\n"
    code += "for tokens, logits in torch.load('outputs.pt'): torch.testing.assert_close(program(tokens), logits)\n"
    code += "print('smoe_dropout' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


def test_export_leaves_no_traces():
    """A layer still has the load of its last real pass."""
    model = sd.moefy(nn.Sequential(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))), sd.SMoEConfig(4, 2)).eval()
    x = torch.randn(5, 8)
    y, load = model(x), sd.moe_layers(model)[0][1].load()
    for strict in (True, False):
        torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), y)
    assert torch.equal(sd.moe_layers(model)[0][1].load(), load)


def test_onnx(exported, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    torch.onnx.export(exported[0], (TOKENS,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=DYNAMIC, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for tokens, expected in zip((TOKENS, OTHERS), exported[1], strict=True):
        [logits] = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_functional_gradients(training, gated):
    """torch.func's gradients, and those of each row by vmap, equal autograd's."""
    torch.manual_seed(0)
    ffn = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))
    model = sd.moefy(nn.Sequential(nn.LayerNorm(8), ffn), sd.SMoEConfig(4, 2, router="learned", init_std=0.5)).double().train(training)
    if gated:
        layer, E = sd.moe_layers(model)[0][1], 4
        layer.experts.activation = "silu_gated"
        layer.experts.up = nn.Parameter(torch.randn(E, 16, 8, dtype=torch.float64))
        layer.experts.bias_up = nn.Parameter(torch.randn(E, 16, dtype=torch.float64))
    parameters, x = dict(model.named_parameters()), torch.randn(5, 8, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum() + sd.auxiliary_loss(model)

    def by_autograd(x):
        twin = copy.deepcopy(model)
        (twin(x).square().sum() + sd.auxiliary_loss(twin)).backward()
        return {name: parameter.grad for name, parameter in twin.named_parameters()}

    found, expected = grad(loss)(parameters, x), by_autograd(x)
    rows = vmap(grad(lambda parameters, row: loss(parameters, row[None])), (None, 0))(parameters, x)
    singles = [by_autograd(row[None]) for row in x]
    for name in parameters:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-9, msg=name)
        torch.testing.assert_close(rows[name], torch.stack([single[name] for single in singles]), rtol=1e-6, atol=1e-9, msg=name)
    model(x)
    assert sd.expert_load(model)["1"].sum() == pytest.approx(1)  # of the last pass, without remains of the transforms


def test_quantised_models_warn_about_their_experts():
    """Once, in the first pass."""
    model = sd.moefy(
        nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))), sd.SMoEConfig(4, 2)
    ).eval()
    x = torch.randn(5, 8)
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.warns(UserWarning, match="its experts have not"):
        quantised(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        quantised(x), model(x)
