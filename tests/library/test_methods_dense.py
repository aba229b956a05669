"""Dense methods match their equations, written in numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smoe_dropout as sd
from smoe_dropout.methods import block_dropout, concrete_dropout, dropblock
from smoe_dropout.methods.base import Forward, Settings
from smoe_dropout.registry import METHODS, load
from tests.library.test_moefy import hand_written, transformer_xl
from tests.library.test_routers import about, numpy
from tests.tiny import parse
from utils.models.build import build_model

H = 16  # hidden width of the models of test_moefy


def hidden(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) + 3  # never 0


# Concrete dropout


def concrete(**options) -> concrete_dropout.ConcreteDropout:
    return concrete_dropout.ConcreteDropout(concrete_dropout.Options(**options), H)


@pytest.mark.parametrize(("rate", "temperature"), [(0.1, 0.1), (0.5, 0.1), (0.8, 1.0)])
def test_concrete_dropout(rate, temperature):
    module, x = concrete(rate=rate, temperature=temperature), hidden(6, 5, 7)
    torch.manual_seed(3)
    y = module(x)
    torch.manual_seed(3)
    u, p = numpy(torch.rand(6, 5, 7)), rate
    z = 1 / (1 + np.exp(-(np.log(p) - np.log(1 - p) + np.log(u) - np.log(1 - u)) / temperature))
    np.testing.assert_allclose(numpy(y), numpy(x) * (1 - z) / (1 - p), rtol=1e-3, atol=1e-4)
    assert torch.equal(module.eval()(x), x)
    assert module.metrics() == {"rate": pytest.approx(rate)}


def test_concrete_dropout_drops_at_its_rate_and_keeps_the_mean():
    y = concrete(rate=0.3, temperature=0.02)(torch.ones(100_000))  # a temperature so low that units are either dropped or kept
    assert about((y < 0.5 / 0.7).sum().item(), 100_000, 0.3)
    assert y.mean().item() == pytest.approx(1, abs=0.02)
    assert concrete(rate=1e-6)(torch.ones(10_000)).isfinite().all()


def test_gradient_of_concrete_dropout_rate():
    """Matches a finite difference with the same random draw."""
    module, x = concrete(rate=0.3, temperature=0.5).double(), hidden(50).double()

    def total(shift: float) -> torch.Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            module.logit += shift
        return module(x).square().sum()

    (gradient,) = torch.autograd.grad(total(0.0), module.logit)
    above, below = total(1e-3).item(), total(-2e-3).item()
    assert gradient.item() == pytest.approx((above - below) / 2e-3, rel=1e-3) and abs(gradient.item()) > 1


def penalty(p: float, W: np.ndarray, l: float, N: int) -> float:  # noqa: E741
    return (l**2 * (W**2).sum() / (1 - p) + W.shape[1] * (p * math.log(p) + (1 - p) * math.log(1 - p))) / N


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("length", [0.0, 0.01, 2.0])
def test_regulariser_and_its_gradients(rate, length):
    module, N = concrete(rate=rate, length_scale=length).double(), 70
    module.behind.append(nn.Linear(H, 5).double())
    weight = module.behind[0].weight
    nn.init.normal_(weight)
    loss, W, p = module.regulariser(N), numpy(weight), module.logit.sigmoid().item()
    assert p == pytest.approx(rate) and loss.item() == pytest.approx(penalty(p, W, length, N), rel=1e-9)
    to_logit, to_weight = torch.autograd.grad(loss, [module.logit, weight])
    slope = (penalty(p + 1e-6, W, length, N) - penalty(p - 1e-6, W, length, N)) / 2e-6
    by_hand = (length**2 * (W**2).sum() / (1 - p) ** 2 + H * (math.log(p) - math.log(1 - p))) / N
    assert to_logit.item() / (p * (1 - p)) == pytest.approx(by_hand, rel=1e-9, abs=1e-6) == pytest.approx(slope, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(numpy(to_weight), 2 * length**2 * W / (1 - p) / N, rtol=1e-9)


def concrete_model(d_inner: int = H, **options) -> tuple[nn.Module, concrete_dropout.Options]:
    options = concrete_dropout.Options(**options)
    return concrete_dropout.convert(transformer_xl(dropout=0.0, d_inner=d_inner), options).train(), options


def passing(model: nn.Module):
    ids = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(2))
    return lambda: Forward(*model(ids[:, :-1], ids[:, 1:]))


def test_concrete_objective_adds_the_regulariser_of_every_layer():
    model, options = concrete_model(length_scale=0.7)
    cores = [decoder.feed_forward.core for decoder in model.layers]
    with torch.no_grad():
        cores[1][2].logit += 1
    objective = concrete_dropout.objective(model, passing(model), Settings(1, 1, options, 2))
    rates = [0.1, 1 / (1 + 9 * math.exp(-1))]
    expected = sum(penalty(p, numpy(core[3].weight), 0.7, 2) for p, core in zip(rates, cores, strict=True))
    assert objective.total.item() - objective.nll.item() == pytest.approx(expected, rel=1e-4) and abs(expected) > 0.1
    names = [f"layers.{index}.feed_forward.core.2.rate" for index in range(2)]
    assert sd.method_metrics(model) == dict(zip(names, map(pytest.approx, rates), strict=True))


@pytest.mark.parametrize(("length", "goal"), [(0.0, 0.5), (10.0, 0.0)])
def test_the_rate_is_learned(length, goal):
    """With a dominant regulariser the rate moves towards maximum entropy, or towards 0 if the prior favours small W / (1 - p)."""
    model, options = concrete_model(d_inner=256, length_scale=length)
    rates = [parameter for name, parameter in model.named_parameters() if name.endswith("logit")]
    assert len(rates) == 2
    optimizer, forward = torch.optim.Adam(rates, lr=0.1), passing(model)
    torch.manual_seed(3)
    for _ in range(60):
        optimizer.zero_grad()
        concrete_dropout.objective(model, forward, Settings(1, 1, options, 1)).total.backward()
        optimizer.step()
    assert all(rate == pytest.approx(goal, abs=0.03) for rate in sd.method_metrics(model).values())


# DropBlock


def spread(begins: np.ndarray, width: int) -> np.ndarray:
    """Mask of units in a block of `width` units that begins at a marked position; one row."""
    out = np.zeros(len(begins) + width - 1, bool)
    for begin in np.flatnonzero(begins):
        out[begin : begin + width] = True
    return out


@pytest.mark.parametrize(("width", "length"), [(1, 6), (2, 6), (3, 9), (5, 5)])
def test_covered_matches_a_loop(width, length):
    begins = torch.rand(4, 50, length - width + 1, generator=torch.Generator().manual_seed(1)) < 0.2
    found = dropblock.covered(begins, width)
    assert found.shape == (4, 50, length) and found.dtype == torch.bool
    expected = [spread(row, width) for row in begins.flatten(0, 1).numpy()]
    np.testing.assert_array_equal(found.flatten(0, 1).numpy(), np.array(expected))


@pytest.mark.parametrize(("width", "rate"), [(1, 0.5), (4, 0.1), (4, 0.6), (H, 0.25)])
def test_dropblock(width, rate):
    module, x = dropblock.DropBlock(width, rate), hidden(30, 20, H)
    torch.manual_seed(3)
    y = module(x)
    torch.manual_seed(3)
    gamma = rate / width * H / (H - width + 1)
    begins = torch.rand(30, 20, H - width + 1).numpy() < gamma
    kept = ~np.array([[spread(row, width) for row in lane] for lane in begins])
    np.testing.assert_allclose(numpy(y), numpy(x) * kept * (kept.size / kept.sum()), rtol=1e-5)
    assert len(np.unique(kept.reshape(600, H), axis=0)) > min(10, 2 ** (H - width))  # drawn per token
    assert torch.equal(module.eval()(x), x)


@pytest.mark.parametrize("width", [1, 2, 8])
def test_dropblock_drops_about_its_rate(width):
    torch.manual_seed(3)
    y = dropblock.DropBlock(width, 0.02)(torch.ones(20_000, H))
    blocks = 20_000 * H / width  # number of independent draws
    assert about((y == 0).sum().item() / width, int(blocks), 0.02)
    assert y.mean().item() == pytest.approx(1, abs=1e-5)
    lengths = [len(run) for row in numpy(y) for run in "".join("x" if value == 0 else " " for value in row).split()]
    assert min(lengths) == width


def test_rate_of_dropblock_grows_over_training():
    model = dropblock.convert(transformer_xl(dropout=0.3), dropblock.Options(rate=0.2, blocks=4))
    names = [f"layers.{index}.feed_forward.core.2.rate" for index in range(2)]
    assert sd.method_metrics(model) == dict.fromkeys(names, 0.2)  # before set_progress
    for step, rate in ((0, 0.0), (25, 0.05), (100, 0.2), (150, 0.2)):
        sd.set_progress(model, step, 100)
        assert sd.method_metrics(model) == dict.fromkeys(names, pytest.approx(rate))
        drop, x = model.layers[1].feed_forward.core[2].train(), torch.ones(4000, H)
        torch.manual_seed(3)
        dropped = (drop(x) == 0).float().mean().item()
        assert (dropped == 0) == (rate == 0) and dropped == pytest.approx(rate, abs=0.02)
    assert all(decoder.feed_forward.core[2].width == H // 4 for decoder in model.layers)


def test_dropblock_handles_dropping_everything():
    torch.manual_seed(3)
    y = dropblock.DropBlock(4, 0.999)(torch.ones(1, 4))
    assert y.isfinite().all() and not y.any()


# block dropout


@pytest.mark.parametrize(("blocks", "rate"), [(4, 0.5), (16, 0.25), (1, 0.5), (4, 0.0)])
def test_block_dropout(blocks, rate):
    module, x = block_dropout.BlockDropout(block_dropout.Options(rate, blocks), 0.0), hidden(3, 5, H)
    torch.manual_seed(3)
    outputs = [module(x) for _ in range(500)]
    torch.manual_seed(3)
    for y in outputs:
        keep = np.repeat(torch.rand(blocks).numpy() >= rate, H // blocks)  # one draw for the whole batch
        np.testing.assert_allclose(numpy(y), numpy(x) * keep / (1 - rate), rtol=1e-5)
    counts = sum((y[0, 0] != 0).numpy().astype(int) for y in outputs)
    assert all(about(count, 500, 1 - rate) for count in counts)  # so the expectation is x
    assert torch.equal(module.eval()(x), x)


def test_block_dropout_keeps_ordinary_dropout_of_hidden_units():
    module, x = block_dropout.BlockDropout(block_dropout.Options(0.5, 2), 0.2), torch.ones(4000, H)
    torch.manual_seed(3)
    blocks = next(y for y in (module(x) for _ in range(20)) if y.any()).view(4000, 2, H // 2)
    kept = [block for block in blocks.unbind(1) if block.any()]
    for block in kept:
        assert about((block == 0).sum().item(), block.numel(), 0.2)
        assert torch.equal(block.unique(), torch.tensor([0, 1 / (0.5 * 0.8)]))
    assert torch.equal(module.eval()(x), x)


# placement in a model

CONVERTED = {
    "concrete_dropout": (concrete_dropout, concrete_dropout.ConcreteDropout),
    "dropblock": (dropblock, dropblock.DropBlock),
    "block_dropout": (block_dropout, block_dropout.BlockDropout),
}


@pytest.mark.parametrize("name", ["relu", "gelu_dropout", "both_dropouts", "no_bias"])
@pytest.mark.parametrize("method", CONVERTED)
def test_convert_places_it_after_the_activation(method, name):
    module, kind = CONVERTED[method]
    model, dense = hand_written(name), hand_written(name)
    assert module.convert(model, module.Options()) is model
    for block, before in zip(model, dense, strict=True):
        assert isinstance(block.ffn[2], kind)
        up, activation, down = (type(part) for part in before.ffn if not isinstance(part, nn.Dropout))
        assert [type(part) for part in block.ffn[:4]] == [up, activation, kind, down]
        assert isinstance(block.ffn[-1], nn.Dropout) == (name == "both_dropouts")  # dropout after the network is kept
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.eval()(x), dense(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", CONVERTED)
def test_convert_keeps_the_mode(method, training):
    module = CONVERTED[method][0]
    model = module.convert(hand_written("both_dropouts").train(training), module.Options())
    assert {path for path, part in model.named_modules() if part.training != training} == set()


@pytest.mark.parametrize("method", ["dropblock", "block_dropout"])
def test_blocks_must_divide_the_width(method):
    module, model = CONVERTED[method][0], hand_written("gelu_dropout")
    model[1].ffn[0], model[1].ffn[3] = nn.Linear(8, 18), nn.Linear(18, 8)
    before = list(model.modules())
    for blocks, width in ((4, 18), (3, 16), (32, 16)):
        with pytest.raises(sd.ConfigError, match=f"blocks = {blocks} does not divide the feed-forward width {width}"):
            module.convert(model, module.Options(blocks=blocks))
    assert list(model.modules()) == before
    module.convert(model, module.Options(blocks=2))


@pytest.mark.parametrize(
    ("module", "values"),
    [
        *((module, values) for module in (dropblock, block_dropout) for values in ({"rate": 1.0}, {"rate": -0.1}, {"blocks": 0})),
        *((concrete_dropout, values) for values in ({"rate": 0.0}, {"rate": 1.0}, {"temperature": 0.0}, {"length_scale": -1.0})),
    ],
    ids=str,
)
def test_invalid_options_are_rejected(module, values):
    with pytest.raises(sd.ConfigError, match="option"):
        module.Options(**values)


@pytest.mark.parametrize(
    ("method", "rates"),
    [("dense", {0.0}), ("dense_dropout", {0.1}), ("concrete_dropout", {0.0}), ("dropblock", {0.0}), ("block_dropout", None)],
)
def test_dense_methods_in_the_training_program(method, rates):
    """Runs have no experts, the method's dropout rates, and the method's module in every layer."""
    sizes = "--n_layer 2 --n_head 2 --d_head 4 --d_model 8 --d_ff 32 --data x --work_dir x"
    flags = parse(["--preset", "quick", "--method", method, *sizes.split()])
    model, definition = build_model(flags), load(METHODS, "method", method)
    assert not (flags.moe or definition.sparse or sd.moe_layers(model)) and definition.layer is None
    assert flags.dense_drop == (method == "block_dropout")
    if rates:
        assert {part.p for part in model.modules() if isinstance(part, nn.Dropout)} == rates
    own = [type(part) for part in model.modules() if type(part) in [kind for _, kind in CONVERTED.values()]]
    assert own == ([CONVERTED[method][1]] * 2 if method in CONVERTED else [])
    assert [core[0].out_features for core in (decoder.feed_forward.core for decoder in model.layers)] == [32, 32]


def test_dense_and_dense_dropout_are_the_plain_network():
    """With equal weights they differ in dropout only."""
    torch.manual_seed(0)
    sizes = "--n_layer 1 --n_head 2 --d_head 4 --d_model 8 --d_ff 32 --data x --work_dir x --preset quick --method"
    plain, dropped = (build_model(parse([*sizes.split(), method])) for method in ("dense", "dense_dropout"))
    dropped.load_state_dict(plain.state_dict())
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(plain.hidden(ids)[0], plain.hidden(ids)[0]) and not torch.equal(dropped.hidden(ids)[0], dropped.hidden(ids)[0])
    assert torch.equal(plain.eval().hidden(ids)[0], dropped.eval().hidden(ids)[0])
    core, x = plain.layers[0].feed_forward.core, torch.randn(4, 8)
    expected = F.relu(x @ core[0].weight.t() + core[0].bias) @ core[3].weight.t() + core[3].bias
    torch.testing.assert_close(core(x), expected)
