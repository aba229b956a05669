"""Every backend matches the reference, forward and backward, and the reference matches a plain numpy implementation."""

import importlib.util
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import smoe_dropout as sd
from smoe_dropout.experts import Experts
from smoe_dropout.experts import sorted as sorted_experts
from smoe_dropout.experts.activations import ACTIVATIONS
from smoe_dropout.experts.choice import choose_backend
from smoe_dropout.experts.dropout import keep_mask, quantised
from smoe_dropout.registry import BACKENDS, load

EXACT = ["reference", "sorted", "masked", "few"]  # any dtype, any width
HAND_WRITTEN = ["sorted", "masked"]
EVERYWHERE = [*EXACT, "grouped"]
PARAMETERS = ("up", "bias_up", "down", "bias_down")


@dataclass(frozen=True)
class Case:
    """Sizes, and the probability of each expert (None: uniform; 0: never chosen)."""

    tokens: int
    k: int
    experts: int
    d_model: int = 8
    d_expert: int = 16
    load: tuple[float, ...] | None = None

    def indices(self, random: np.random.Generator) -> torch.Tensor:
        p = None if self.load is None else np.array(self.load) / sum(self.load)
        rows = [random.choice(self.experts, self.k, replace=False, p=p) for _ in range(self.tokens)]
        return torch.tensor(np.array(rows, dtype=np.int64).reshape(self.tokens, self.k))


CASES = {
    "typical": Case(13, 3, 5),
    "k_is_1": Case(13, 1, 5),
    "k_is_E": Case(7, 4, 4),
    "one_token": Case(1, 2, 4),
    "no_token": Case(0, 2, 4),
    "experts_without_tokens": Case(9, 2, 6, load=(0, 1, 0, 0, 1, 0)),
    "all_to_the_last": Case(9, 1, 6, load=(0, 0, 0, 0, 0, 1)),
    "one_expert": Case(6, 1, 1),
    "uneven": Case(40, 2, 4, load=(0.9, 0.06, 0.03, 0.01)),
    "wide": Case(5, 2, 3, d_model=4, d_expert=40),
}
# an activation that the backends do not treat in a way of its own needs few cases
COMMON = [name + gated for name in ("relu", "gelu", "gelu_tanh", "silu") for gated in ("", "_gated")]
PAIRS = [  # in one test for each case: thousands of tests take longer to report than to run
    pytest.param(case, [one for one in ACTIVATIONS if one in COMMON or name in ("typical", "no_token")], id=name)
    for name, case in CASES.items()
]


def experts_of(case: Case, backend: str, activation="relu", dropout=0.0, dtype=torch.float64) -> Experts:
    """Experts with nonzero weights and biases, identical for every backend and dtype."""
    experts = Experts(case.experts, case.d_model, case.d_expert, activation, dropout, backend, 0.02).to(dtype)
    random = np.random.default_rng(1)
    with torch.no_grad():
        for name in PARAMETERS:
            parameter = getattr(experts, name)
            parameter.copy_(torch.tensor(random.normal(size=tuple(parameter.shape)) * 0.5).bfloat16())  # exact in every tested dtype
    return experts


def outcome(case: Case, backend: str, activation: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output and all gradients as float64, for inputs that are exact in every dtype."""
    random = np.random.default_rng(0)
    indices = case.indices(random)
    experts = experts_of(case, backend, activation, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)

    def draw(*shape):
        return torch.tensor(random.normal(size=shape)).bfloat16().to(dtype)

    x, weights, grad = draw(case.tokens, case.d_model), draw(case.tokens, case.k), draw(case.tokens, case.d_model)
    y = experts(x.requires_grad_(), indices, weights.requires_grad_())
    assert y.dtype == dtype and y.shape == x.shape
    y.backward(grad)
    grads = {name: getattr(experts, name).grad for name in PARAMETERS}
    return {name: tensor.detach().double() for name, tensor in {"y": y, "x": x.grad, "weights": weights.grad, **grads}.items()}


def assert_near(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float, of: str = ""):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        error, size = (ours[name] - tensor).norm(), tensor.norm()
        assert error <= tolerance * size, f"{of} {name}: relative error {error / size:.1e}"


ROUNDED = ("hardswish", "softplus", "sqrt_softplus")  # a derivative that jumps, or values far from 0 whose sum is rounded


@pytest.mark.parametrize(("case", "activations"), PAIRS)
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [(backend, torch.float64, 1e-12) for backend in HAND_WRITTEN]
    + [(backend, torch.float32, 1e-5) for backend in EVERYWHERE]
    + [(backend, torch.bfloat16, 2e-2) for backend in EVERYWHERE],
    ids=str,
)
def test_output_and_gradients_match_the_reference(backend, dtype, tolerance, activations, case):
    for activation in activations:
        if backend == "grouped" and any(size * dtype.itemsize % 16 for size in (case.d_model, case.d_expert)):
            with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
                outcome(case, backend, activation, dtype)
        else:
            near = 3 * tolerance if dtype == torch.bfloat16 and activation.removesuffix("_gated") in ROUNDED else tolerance
            expected = outcome(case, "reference", activation, torch.float64)
            assert_near(outcome(case, backend, activation, dtype), expected, near, activation)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_padding_rows_do_not_change_results(case, monkeypatch):
    monkeypatch.setattr(sorted_experts, "multiple_of_rows", lambda dtype: 16)
    assert_near(outcome(case, "sorted", "gelu", torch.float64), outcome(case, "reference", "gelu", torch.float64), 1e-12)


def test_float32_rows_are_padded_with_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision="none"))  # whatever tune_cpu has set before
    own = [sorted_experts.multiple_of_rows(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision="bf16"))
    assert (own, sorted_experts.multiple_of_rows(torch.float32)) == ([1, 1, 32], 16)


@pytest.mark.parametrize(("case", "activations"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_without_gradients_match_the_reference(dtype, activations, case):
    """Without gradients `few` uses sums over rows if there are no more assignments than experts."""
    random = np.random.default_rng(0)
    indices = case.indices(random)
    x, weights = (torch.tensor(random.normal(size=(case.tokens, size))).bfloat16() for size in (case.d_model, case.k))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for activation in activations:
        with torch.no_grad():
            few = experts_of(case, "few", activation, dtype=dtype)(x.to(dtype), indices, weights.to(dtype))
            expected = experts_of(case, "reference", activation)(x.double(), indices, weights.double())
        assert few.dtype == dtype
        assert_near({"y": few.double()}, {"y": expected}, tolerance, activation)


PLAIN_ACTIVATIONS = {
    "relu": lambda v: max(v, 0.0),
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "gelu_tanh": lambda v: v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) / 2,
    "silu": lambda v: v / (1 + math.exp(-v)),
    "quick_gelu": lambda v: v / (1 + math.exp(-1.702 * v)),
    "relu2": lambda v: max(v, 0.0) ** 2,
    "relu6": lambda v: min(max(v, 0.0), 6.0),
    "gelu_clipped": lambda v: min(max(v * (1 + math.erf(v / math.sqrt(2))) / 2, -10), 10),
    "laplace": lambda v: (1 + math.erf((v - 0.707107) / (0.282095 * math.sqrt(2)))) / 2,
    "mish": lambda v: v * math.tanh(math.log1p(math.exp(v))),
    "tanh": math.tanh,
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "leaky_relu": lambda v: v if v > 0 else 0.01 * v,
    "hardswish": lambda v: v * min(max(v + 3, 0.0), 6.0) / 6,
    "elu": lambda v: v if v > 0 else math.expm1(v),
    "softplus": lambda v: math.log1p(math.exp(v)),
    "sqrt_softplus": lambda v: math.sqrt(math.log1p(math.exp(v))),
    "linear": lambda v: v,
}


@pytest.mark.parametrize(("case", "activations"), PAIRS)
def test_reference_matches_a_plain_implementation(activations, case):
    for activation in activations:
        random = np.random.default_rng(2)
        experts, indices = experts_of(case, "reference", activation), case.indices(random)
        x, weights = random.normal(size=(case.tokens, case.d_model)), random.normal(size=(case.tokens, case.k))
        up, bias_up, down, bias_down = (getattr(experts, name).detach().numpy() for name in PARAMETERS)
        expected, plain = np.zeros_like(x), PLAIN_ACTIVATIONS[activation.removesuffix("_gated")]
        for n in range(case.tokens):
            for slot, i in enumerate(indices[n].tolist()):
                pre = up[i] @ x[n] + bias_up[i]
                if activation.endswith("_gated"):
                    hidden = [plain(gate) * value for gate, value in zip(pre[: len(pre) // 2], pre[len(pre) // 2 :], strict=True)]
                else:
                    hidden = [plain(value) for value in pre]
                expected[n] += weights[n, slot] * (down[i].T @ hidden + bias_down[i])
        y = experts(torch.tensor(x), indices, torch.tensor(weights))
        np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-12, atol=1e-12, err_msg=activation)


def functional(experts: Experts, indices: torch.Tensor, seed: int | None = None):
    """Experts as a function of all differentiable inputs, with its arguments; with a seed dropout always draws the same mask."""
    torch.manual_seed(5)
    leaves = [torch.randn(len(indices), experts.up.shape[2]), torch.randn(indices.shape), *(p.detach() for p in experts.parameters())]

    def apply(x, weights, *parameters):
        if seed is not None:
            torch.manual_seed(seed)
        return torch.func.functional_call(experts, dict(zip(PARAMETERS, parameters, strict=True)), (x, indices, weights))

    return apply, [leaf.double().requires_grad_() for leaf in leaves]


SMALL, SMALL_INDICES = Case(4, 2, 3, d_model=3, d_expert=4), torch.tensor([[0, 1], [1, 0], [2, 0], [1, 2]])


CHECKED = [("reference", name) for name in ACTIVATIONS if name in COMMON or not name.endswith("_gated")]
CHECKED += [(backend, activation) for backend in EXACT[1:] for activation in ("gelu", "silu_gated")]


@pytest.mark.parametrize(("backend", "activation"), CHECKED)
def test_gradcheck(backend, activation):
    """The reference in every activation; that the other backends have its gradients is tested above."""
    assert gradcheck(*functional(experts_of(SMALL, backend, activation), SMALL_INDICES))


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("backend", EXACT)
def test_backward_uses_the_mask_of_its_own_forward(backend, activation):
    function, leaves = functional(experts_of(SMALL, backend, activation, dropout=0.4), SMALL_INDICES, seed=3)
    without, _ = functional(experts_of(SMALL, backend, activation), SMALL_INDICES)
    assert not torch.equal(function(*leaves), without(*leaves))
    assert gradcheck(function, leaves)


@pytest.mark.parametrize("backend", EXACT)
def test_second_derivative_is_correct_or_rejected(backend):
    function, leaves = functional(experts_of(SMALL, backend, "gelu"), SMALL_INDICES)
    if backend in ("reference", "few"):
        assert gradgradcheck(function, leaves)
    else:
        with pytest.raises(RuntimeError, match="differentiat"):
            gradgradcheck(function, leaves)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_input_layout_and_frozen_parameters_do_not_change_results(backend):
    """Tokens as a transposed view, the expanded gradient of a sum, and some parameters without gradients."""
    case, results = CASES["typical"], []
    indices = case.indices(np.random.default_rng(0))
    torch.manual_seed(0)
    x, weights = torch.randn(case.d_model, case.tokens).t(), torch.rand(case.tokens, case.k)
    for name, tokens in (("reference", x.contiguous()), (backend, x)):
        experts = experts_of(case, name, dtype=torch.float32)
        experts.up.requires_grad_(False)
        tokens = tokens.detach().requires_grad_()
        y = experts(tokens, indices, weights)
        y.sum().backward()
        results.append({"y": y.detach(), "x": tokens.grad, **{name: getattr(experts, name).grad for name in PARAMETERS[1:]}})
        assert experts.up.grad is None
    assert_near(results[1], results[0], 1e-5)


# dropout of hidden values


@pytest.mark.parametrize(
    ("p", "used"), [(0.0, 0.0), (1.0, 1.0), (0.1, 26 / 256), (0.5, 0.5), (0.25, 0.25), (1e-9, 1 / 256), (1 - 1e-9, 255 / 256)]
)
def test_quantised(p, used):
    assert quantised(p) == used


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_keep_mask_drops_the_right_fraction_in_every_byte_of_a_word(p):
    torch.manual_seed(0)
    q, n = quantised(p), 40_000
    dropped_8 = 1 - keep_mask((n, 8), p, torch.device("cpu")).double().mean(0)
    assert (dropped_8 - q).abs().max() < 5 * math.sqrt(q * (1 - q) / n)
    assert keep_mask((3, 5), p, torch.device("cpu")).shape == (3, 5)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_fraction_of_dropped_values_and_scale_of_kept_ones(backend, p):
    experts = Experts(2, 8, 8, "relu", p, backend, 0.02)
    with torch.no_grad():  # all hidden values are 1, and the output is the hidden layer
        experts.up.zero_(), experts.bias_up.fill_(1), experts.down.copy_(torch.eye(8))
    torch.manual_seed(0)
    n, q = 8000, quantised(p) if backend in HAND_WRITTEN else p
    y = experts(torch.randn(n, 8), torch.arange(n)[:, None] % 2, torch.ones(n, 1)).detach()
    assert abs((y == 0).double().mean() - q) < 5 * math.sqrt(q * (1 - q) / (n * 8))
    torch.testing.assert_close(y[y != 0], torch.tensor(1 / (1 - q)).expand(int((y != 0).sum())))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_dropout_is_unbiased_and_off_in_evaluation(backend, activation):
    case, draws = Case(3, 2, 3), 6000
    experts, plain = (experts_of(case, backend, activation, dropout, dtype=torch.float32) for dropout in (0.4, 0.0))
    torch.manual_seed(0)
    x, weights, indices = torch.randn(3, 8), torch.rand(3, 2), torch.tensor([[0, 1], [1, 2], [2, 0]])
    expected = plain(x, indices, weights)
    y = experts(x.repeat(draws, 1), indices.repeat(draws, 1), weights.repeat(draws, 1)).detach().view(draws, 3, 8)
    error_of_mean = y.std(0) / math.sqrt(draws)
    assert ((y.mean(0) - expected).abs() < 5 * error_of_mean).all()
    assert error_of_mean.max() < 0.05 * expected.abs().mean()  # small enough to detect a wrong scale
    assert torch.equal(experts.eval()(x, indices, weights), expected)


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_dropping_everything_leaves_the_output_bias(backend):
    """nn.Dropout accepts p = 1, so a model may have it."""
    indices, weights, x = torch.tensor([[0], [1]]), torch.ones(2, 1), torch.randn(2, 8)
    experts = experts_of(Case(2, 1, 2), backend, dropout=1.0, dtype=torch.float32)
    torch.testing.assert_close(experts(x, indices, weights), experts.bias_down)


# training


@pytest.mark.parametrize("backend", EVERYWHERE)
def test_expert_without_tokens_has_a_zero_gradient_and_adam_keeps_moving_it(backend):
    experts = experts_of(Case(4, 1, 2), backend, "gelu", dtype=torch.float32)
    optimizer = torch.optim.Adam(experts.parameters(), lr=0.1)
    for indices in ([[0], [1], [0], [1]], [[0], [0], [0], [0]]):
        before = {name: getattr(experts, name).detach().clone() for name in PARAMETERS}
        optimizer.zero_grad()
        experts(torch.ones(4, 8), torch.tensor(indices), torch.ones(4, 1)).sum().backward()
        optimizer.step()
    for name in PARAMETERS:
        parameter = getattr(experts, name)
        assert torch.count_nonzero(parameter.grad[1]) == 0 and torch.count_nonzero(parameter.grad[0]) > 0
        assert (parameter.detach()[1] != before[name][1]).any()


@pytest.mark.parametrize("backend", [*EVERYWHERE, "auto"])
def test_autocast_bf16_is_close_to_float32_and_chooses_the_same_experts(backend):
    torch.manual_seed(0)
    config = sd.SMoEConfig(4, 2, backend=backend)
    layer = sd.MoELayer(8, experts_of(Case(0, 2, 4), backend, "gelu", dtype=torch.float32), config)
    results, chosen = [], []
    for enabled in (False, True):
        layer.zero_grad()
        x = torch.linspace(-2, 2, 80).view(10, 8).sin().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(x)
        y.float().sum().backward()
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        grads = {name: getattr(layer.experts, name).grad for name in PARAMETERS}
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        results.append({"y": y.detach().float(), "x": x.grad, **grads})
        chosen.append(layer.assigned)
    assert torch.equal(*chosen)
    assert_near(results[1], results[0], 2e-2)


# rejected inputs and backend selection


@pytest.mark.parametrize(
    ("backend", "d_model", "d_expert", "dtype", "sentence"),
    [
        ("fastmoe", 8, 8, torch.float32, "CUDA tensors" if importlib.util.find_spec("fmoe") else "fastmoe is not installed"),
        ("grouped", 8, 8, torch.float64, "does not support torch.float64"),
        ("grouped", 6, 8, torch.float32, "d_expert = 8, d_model = 6"),
        ("grouped", 8, 6, torch.float32, "d_expert = 6, d_model = 8"),
        ("grouped", 8, 12, torch.bfloat16, "multiple of 16 bytes"),
    ],
)
def test_unsupported_inputs_are_rejected(backend, d_model, d_expert, dtype, sentence):
    experts = Experts(2, d_model, d_expert, "relu", 0.0, backend, 0.02).to(dtype)
    with pytest.raises(RuntimeError, match=sentence) as error:
        experts(torch.zeros(1, d_model, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert backend in str(error.value) and "auto" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_is_a_pure_function_and_selects_supported_backends(device, dtype):
    sizes = [(n, k, 16, H, D) for n in (0, 1, 64, 11264) for k in (1, 4, 8, 12, 16) for H in (4, 6, 512) for D in (3, 8, 256)]
    state = torch.get_rng_state()
    first = {size: choose_backend(*size, dtype, device) for size in sizes}
    assert {size: choose_backend(*size, dtype, device) for size in reversed(sizes)} == first
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(first.values())) > 1  # the sizes cover several choices
    assert "few" not in first.values()
    without_gradients = {choose_backend(*size, dtype, device, training=False) == "few" for size in sizes if size[0] < 2}
    assert without_gradients == {device == "cpu"}
    for (_, _, E, H, D), name in first.items():
        stub = Experts(1, D, H, "relu", 0.0, "auto", 0.02).weights(dtype)
        assert load(BACKENDS, "backend", name).refusal(stub, device) is None, (E, H, D, name)
