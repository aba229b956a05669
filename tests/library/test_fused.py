"""The fused backend's kernels match the reference in Triton's CPU interpreter, and compile for a GPU without one being present.

Triton reads TRITON_INTERPRET on import, so kernels run and compile in separate processes.
"""

import importlib.util
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from smoe_dropout.experts import Experts, ExpertWeights, fused
from smoe_dropout.experts.activations import ACTIVATIONS
from tests.library.test_experts import CASES, PARAMETERS, Case, assert_near, experts_of, outcome

with_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
RAGGED = Case(37, 3, 5, d_model=10, d_expert=19)  # two blocks of tokens, no size a power of two
SIZES = CASES | {"ragged": RAGGED, "several_blocks_of_columns": Case(3, 2, 3, d_model=6, d_expert=300)}


@contextmanager
def process(interpret: str, cache):
    """Yield a function that runs another one in a process with or without Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", interpret)
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    with process("1", tmp_path_factory.mktemp("cache")) as call:
        yield call


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    with process("0", tmp_path_factory.mktemp("cache")) as call:
        yield call


def check_outcome(case: Case, activation: str, dtype: torch.dtype, tolerance: float) -> None:
    assert_near(outcome(case, "fused", activation, dtype), outcome(case, "reference", activation, torch.float64), tolerance)


@with_triton
@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("activation", fused.COMPUTED)
def test_output_and_gradients_match_the_reference(interpreted, activation, case):
    interpreted(check_outcome, case, activation, torch.float32, 1e-5)


@with_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", fused.COMPUTED)
def test_half_precision_is_close_to_the_reference(interpreted, activation, dtype):
    interpreted(check_outcome, RAGGED, activation, dtype, 2e-2)


def check_layout() -> None:
    case, results = RAGGED, []
    indices, x = case.indices(np.random.default_rng(0)), torch.randn(case.d_model, case.tokens).t()
    for backend, tokens in (("reference", x.contiguous()), ("fused", x)):
        experts = experts_of(case, backend, dtype=torch.float32)
        experts.bias_up.data = experts.bias_up.data.t().contiguous().t()
        tokens = tokens.detach().requires_grad_()
        experts(tokens, indices, torch.ones(indices.shape)).sum().backward()
        results.append({"x": tokens.grad, **{name: getattr(experts, name).grad for name in PARAMETERS}})
    assert_near(results[1], results[0], 1e-5)


@with_triton
def test_input_layout_does_not_change_results(interpreted):
    """Tokens and a bias as transposed views, and the expanded gradient of a sum."""
    interpreted(check_layout)


def check_not_a_number(activation: str) -> None:
    x = torch.ones(3, 8)
    x[1, 0] = math.nan
    experts = experts_of(Case(3, 1, 2), "fused", activation, dtype=torch.float32)
    assert experts(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)).isnan().all(1).tolist() == [False, True, False]


@with_triton
@pytest.mark.parametrize("activation", fused.COMPUTED)
def test_nan_is_kept_and_does_not_spread_to_other_tokens(interpreted, activation):
    interpreted(check_not_a_number, activation)


def check_second_derivative() -> None:
    experts = experts_of(RAGGED, "fused", dtype=torch.float32)
    x = torch.ones(RAGGED.tokens, RAGGED.d_model, requires_grad=True)
    y = experts(x, RAGGED.indices(np.random.default_rng(0)), torch.ones(RAGGED.tokens, RAGGED.k))
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@with_triton
def test_second_derivative_is_rejected(interpreted):
    interpreted(check_second_derivative)


# dropout


def kept(p: float, seed: int, tokens: int = 37, experts: int = 3, d_expert: int = 19) -> torch.Tensor:
    """Dropout factors of hidden values [N, E, H]: the values are 1 here, and the output is one expert's hidden layer."""
    probe = Experts(experts, d_expert, d_expert, "relu", p, "fused", 0.02)
    torch.nn.init.zeros_(probe.up), torch.nn.init.ones_(probe.bias_up)
    probe.down.data = torch.eye(d_expert).expand(experts, -1, -1).contiguous()
    indices, x, columns = torch.arange(experts).expand(tokens, -1), torch.zeros(tokens, d_expert), []
    for weights in torch.eye(experts):
        torch.manual_seed(seed)
        columns.append(probe(x, indices, weights.expand(tokens, -1)).detach())
    return torch.stack(columns, 1)


def check_one_mask(activation: str) -> None:
    case, random = Case(37, 2, 3, d_model=10, d_expert=19), np.random.default_rng(0)
    experts, indices, results = experts_of(case, "fused", activation, 0.4, torch.float32), case.indices(random), []
    factors = kept(0.4, seed=3)
    x, weights, grad = (torch.tensor(random.normal(size=shape)).float() for shape in ((37, 10), (37, 2), (37, 10)))

    def by_hand(x, indices, weights):
        gate = torch.zeros(37, 3).scatter(1, indices, weights)
        hidden = ACTIVATIONS[activation].apply(torch.einsum("nd,ehd->neh", x, experts.up) + experts.bias_up) * factors
        return torch.einsum("ne,neh,ehd->nd", gate, hidden, experts.down) + gate @ experts.bias_down

    for function in (experts, by_hand):
        torch.manual_seed(3)
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = function(leaves[0], indices, leaves[1])
        gradients = torch.autograd.grad(y, [*leaves, *experts.parameters()], grad)
        results.append(dict(zip(["y", "x", "weights", *PARAMETERS], [y.detach(), *gradients], strict=True)))
    assert_near(*results, 1e-5)


@with_triton
@pytest.mark.parametrize("activation", fused.COMPUTED)
def test_backward_uses_the_mask_of_its_own_forward(interpreted, activation):
    interpreted(check_one_mask, activation)


def check_share(p: float) -> None:
    factors = kept(p, seed=0)
    torch.testing.assert_close(factors[factors != 0], torch.tensor(1 / (1 - p)).expand(int((factors != 0).sum())))
    assert abs((factors == 0).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / factors.numel())


@with_triton
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_kept_values_are_scaled_so_that_dropout_is_unbiased(interpreted, p):
    interpreted(check_share, p)


def check_masks_differ() -> None:
    factors = kept(0.5, seed=0, tokens=40, d_expert=50)
    assert torch.equal(factors, kept(0.5, seed=0, tokens=40, d_expert=50))
    for other in (kept(0.5, seed=1, tokens=40, d_expert=50), kept(0.5, seed=0, tokens=40, d_expert=50).roll(1, 0)):
        assert 0.4 < (factors == other).double().mean() < 0.6
    assert len(factors.flatten(0, 1).unique(dim=0)) == 40 * 3 and len(factors.flatten(0, 1).unique(dim=1).t()) == 50


@with_triton
def test_masks_of_seeds_tokens_experts_and_columns_differ(interpreted):
    interpreted(check_masks_differ)


def check_nothing_kept() -> None:
    experts = experts_of(Case(2, 1, 2), "fused", dropout=1.0, dtype=torch.float32)
    torch.testing.assert_close(experts(torch.randn(2, 8), torch.tensor([[0], [1]]), torch.ones(2, 1)), experts.bias_down)


@with_triton
def test_dropping_everything_leaves_the_output_bias(interpreted):
    interpreted(check_nothing_kept)


# the device


def compile_for_cuda(kernel: str, activation: str, dtype: str, dropout: bool) -> bytes:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {"H": 512, "ACTIVATION": activation, "BLOCK_N": fused.BLOCK_N, "BLOCK_H": fused.MAX_BLOCK_H}
    types = {"seed_ptr": "*i64", "p": "fp32", "scale": "fp32", "N": "i32", "E": "i32", "grad_gate_ptr": "*fp32", "grad_bias_ptr": "*fp32"}
    if not dropout:
        constants["seed_ptr"] = None
    function = getattr(fused, kernel)
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{dtype}") for name in function.arg_names}
    target, options = GPUTarget("cuda", 90, 32), {"num_warps": fused.WARPS}
    return compile(ASTSource(function, signature, constants), target=target, options=options).asm["cubin"]


@with_triton
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
@pytest.mark.parametrize(
    ("activation", "dtype", "dropout"),
    [("relu", "bf16", False), ("gelu", "fp32", True), ("gelu_tanh", "fp16", True), ("silu", "bf16", True)],
)
def test_kernels_compile_without_a_gpu(compiled, kernel, activation, dtype, dropout):
    """The compiler checks types, the interpreter does not."""
    assert compiled(compile_for_cuda, kernel, activation, dtype, dropout).startswith(b"\x7fELF")


@pytest.mark.parametrize("backend", ["grouped", pytest.param("fused", marks=with_triton)])
def test_no_synchronisation_with_the_device(monkeypatch, backend):
    """Uses fake tensors: reading a value, or a size that depends on one, fails."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "_launch", lambda *tensors, **settings: None)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        experts = Experts(4, 8, 16, "gelu", 0.1, backend, 0.02)
        x, weights = torch.randn(6, 8, requires_grad=True), torch.rand(6, 2, requires_grad=True)
        experts(x, torch.zeros(6, 2, dtype=torch.int64), weights).sum().backward()
        assert x.grad.shape == x.shape and weights.grad.shape == weights.shape
        assert all(parameter.grad.shape == parameter.shape for parameter in experts.parameters())


@pytest.mark.parametrize(
    ("triton", "interpret", "device", "activation", "dtype", "sentence"),
    [
        (None, "1", "cuda", "relu", torch.float32, "Triton is not installed"),
        (
            "here",
            "0",
            "cpu",
            "relu",
            torch.float32,
            "need CUDA tensors, but these are on 'cpu', where they only run, slowly,",
        ),
        ("here", "0", "cuda", "silu_gated", torch.float32, "support relu, gelu, gelu_tanh, silu, not silu_gated"),
        ("here", "0", "cuda", "relu", torch.float64, "do not support torch.float64"),
        ("here", "1", "cpu", "relu", torch.float32, None),
        ("here", "0", "cuda", "gelu", torch.bfloat16, None),
    ],
)
def test_unsupported_inputs_are_rejected(monkeypatch, triton, interpret, device, activation, dtype, sentence):
    monkeypatch.setattr(fused, "triton", triton)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    weights = ExpertWeights(*Experts(2, 4, 4, activation, 0.0, "fused", 0.02).weights(dtype)[:4], activation, 0.0)
    refused = fused.refusal(weights, device)
    assert refused is None if sentence is None else sentence in refused
