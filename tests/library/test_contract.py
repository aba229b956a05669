"""Properties of every registered method and router. A new one is tested as soon as it is registered."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mem_transformer import MemTransformerLM
from smoe_dropout import SMoEConfig, auxiliary_loss, get_top_k, load_weights, moe_layers, moefy, save_model, set_progress, set_top_k, top_k
from smoe_dropout.methods.base import Forward, Method, Objective
from smoe_dropout.registry import BACKENDS, METHODS, ROUTERS, load
from tests import tiny
from tests.tiny import parse
from utils.flags.derive import method_of, top_k_schedule
from utils.flags.fields import Flags
from utils.models.build import build_model, training_settings
from utils.training.optimizer import build_optimizer

E, LAYERS, LANES, POSITIONS, STEPS = 4, 2, 3, 6, 8
TRAIN_TOKENS = 20_000
SPARSE = [name for name in METHODS if load(METHODS, "method", name).sparse]
BACKENDS_HERE = [name for name in BACKENDS if name not in ("reference", "fastmoe", "fused")]  # CUDA only

# weights large enough that every path from token to loss carries a signal well above rounding error
SIZES = {"n_layer": LAYERS, "moe_num_expert": E, "tgt_len": POSITIONS, "eval_tgt_len": POSITIONS, "mem_len": 4, "init_std": 0.2}


def flags_of(name: str, **changes) -> Flags:
    return parse(tiny.flags(Path("unused"), Path("unused"), **{**SIZES, "method": name, "max_step": STEPS, **changes}))


def build(name: str, seed: int = 0, **changes) -> tuple[MemTransformerLM, Flags]:
    flags = flags_of(name, **changes)
    torch.manual_seed(seed)
    return build_model(flags), flags


def text(seed: int, lanes: int = LANES, positions: int = POSITIONS) -> tuple[Tensor, Tensor]:
    """Tokens and targets [B, T]."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(256, (lanes, positions), generator=draw) for _ in range(2))


def backward(model: MemTransformerLM, flags: Flags, step: int, seed: int, memory=None, **shape) -> Objective:
    """One training pass with the method's own objective, as in train.py."""
    if schedule := top_k_schedule(flags):
        set_top_k(model, schedule(step))
    set_progress(model, step, flags.max_step)
    tokens, targets = text(seed, **shape)
    settings = training_settings(flags, TRAIN_TOKENS)
    model.train()
    found = method_of(flags).objective(model, lambda: Forward(*model(tokens, targets, memory)), settings)
    found.total.backward()
    return found


def train(model: MemTransformerLM, flags: Flags, steps: int) -> None:
    """Run a few updates; the graph of the last pass stays alive."""
    optimizer, memory = build_optimizer(model, flags), None
    for step in range(steps):
        optimizer.zero_grad()
        memory = backward(model, flags, step, seed=step, memory=memory).state
        optimizer.step()


@torch.no_grad()
def answer(model: MemTransformerLM, seed: int = 100, k: int | None = None, tokens: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of a text in evaluation mode at k, always from the same random state."""
    model.eval()
    if k is not None:
        set_top_k(model, k)
    torch.manual_seed(7)
    given, targets = text(seed)
    given = given if tokens is None else tokens
    _, memory, _ = model(*text(seed + 1))
    return model(given, targets, memory)[2]


def routers(model: nn.Module) -> set[str]:
    prefixes = tuple(f"{name}.router." for name, _ in moe_layers(model))
    return {name for name, _ in model.named_parameters() if prefixes and name.startswith(prefixes)}


@contextmanager
def gradients(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Largest absolute gradient of each parameter element over all steps in the block; parameters without gradient are absent."""
    found: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(parameter: Tensor) -> None:
            found[name] = torch.maximum(found.get(name, torch.zeros(())), parameter.grad.abs())

        return hook

    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(keep(name)) for name, parameter in trained]
    yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", METHODS)
def test_objective_is_finite_and_carries_memory(name):
    model, flags = build(name)
    memory = None
    for step in range(3):
        model.zero_grad()
        found = backward(model, flags, step, seed=step, memory=memory)
        assert found.total.shape == found.nll.shape == () and math.isfinite(found.total.item()) and 0 < found.nll.item() < 20
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
        memory = found.state
        assert [tuple(layer.shape) for layer in memory] == [(LANES, 4, flags.d_model)] * (LAYERS + 1)
        assert not any(layer.requires_grad for layer in memory)


@pytest.mark.parametrize("name", METHODS)
def test_all_parameters_are_trained_except_frozen_ones(name):
    method: Method = load(METHODS, "method", name)
    model, flags = build(name)
    frozen = {parameter for parameter, p in model.named_parameters() if not p.requires_grad}
    assert frozen == (routers(model) if method.flags.get("freeze_gate") else set())
    assert bool(routers(model)) == (method.sparse and method.flags["gate_name"] != "none")
    before = copy.deepcopy(dict(model.named_parameters()))
    with gradients(model) as reached:
        train(model, flags, STEPS)
    assert reached.keys() == before.keys() - frozen
    for parameter, found in reached.items():
        experts = ".experts." in parameter  # every expert
        assert all(part.max() > 0 for part in (found if experts else found[None])), parameter
    changed = {parameter for parameter, p in model.named_parameters() if not torch.equal(p, before[parameter])}
    assert changed == before.keys() - frozen


@pytest.mark.parametrize("name", SPARSE)
def test_changing_k_takes_effect(name):
    model, _ = build(name)
    logits = {}
    for k in range(1, E + 1):
        logits[k] = answer(model, k=k)
        assert get_top_k(model) == k
        for _, layer in moe_layers(model):
            assert layer.assigned.shape == (LANES * POSITIONS, k)
            chosen = [[e for e in row if e >= 0] for row in layer.assigned.tolist()]
            assert all(len(set(row)) == len(row) and (len(row) == k or layer.variable) for row in chosen)  # all distinct
    assert (logits[1] - logits[E]).abs().max() > 1e-2
    set_top_k(model, 3)
    with top_k(model, 1):
        assert get_top_k(model) == 1 and torch.equal(answer(model), logits[1])
    assert get_top_k(model) == 3 and torch.equal(answer(model), logits[3])
    with pytest.raises(ZeroDivisionError), top_k(model, 2):
        raise ZeroDivisionError
    assert get_top_k(model) == 3


@pytest.mark.parametrize("name", SPARSE)
def test_objective_restores_the_scheduled_k(name):
    model, flags = build(name)
    for step in range(3):
        backward(model, flags, step, seed=step)
        assert get_top_k(model) == top_k_schedule(flags)(step)


@pytest.mark.parametrize("name", METHODS)
def test_weights_round_trip_through_a_file(name, tmp_path):
    model, flags = build(name)
    train(model, flags, STEPS)
    save_model(model, tmp_path)
    fresh, _ = build(name, seed=1)
    ks = [None] if not flags.moe else [1, 2, E]
    assert not torch.equal(answer(fresh), answer(model))
    load_weights(fresh, tmp_path)
    assert fresh.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in fresh.state_dict().items())
    for k in ks:
        assert torch.equal(answer(fresh, k=k), answer(model, k=k)), k


@pytest.mark.parametrize("name", METHODS)
def test_copy_between_passes_is_complete_and_independent(name):
    """The copy is made while the graph of a training pass is alive; afterwards the two models share no state."""
    model, flags = build(name)
    train(model, flags, steps=2)
    twin = copy.deepcopy(model)
    ours = answer(model)
    assert torch.equal(answer(twin), ours)
    answer(twin, seed=50)  # must not affect the original
    assert torch.equal(answer(model), ours)
    twin.zero_grad()
    torch.manual_seed(3)
    backward(twin, flags, 2, seed=60)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(answer(model), ours) and not torch.equal(answer(twin), ours)


@pytest.mark.parametrize("name", METHODS)
def test_no_state_persists_after_a_pass(name):
    """A pass over another text of another shape, in training or evaluation, does not change later outputs."""
    model, flags = build(name)
    if flags.moe:
        set_top_k(model, 2)
    first = answer(model)
    assert torch.equal(answer(model), first)
    torch.manual_seed(3)
    backward(model, flags, 0, seed=70, lanes=LANES + 1, positions=POSITIONS - 1)
    assert all(layer.shared.carried is None for _, layer in moe_layers(model))
    if flags.moe:
        set_top_k(model, 2)
    with torch.no_grad():
        model.eval()(*text(80, lanes=1, positions=2))
    assert torch.equal(answer(model), first)
    assert auxiliary_loss(model) == 0  # the loss of the training pass is gone


@pytest.mark.parametrize("name", METHODS)
def test_outputs_do_not_depend_on_later_tokens(name):
    model, flags = build(name)
    tokens, _ = text(100)
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 256
    for k in (1, 2, E) if flags.moe else (None,):
        one, two = (answer(model, k=k, tokens=given) for given in (tokens, other))
        assert torch.allclose(one[:, :4], two[:, :4], atol=1e-5), k
        assert (one[:, 4:] - two[:, 4:]).abs().max() > 0.1


KINDS = ("smoe_dropout", "competesmoe", "moe_plus_plus", "thor")  # frozen and learned router, tokens without experts, no router
PAIRS = [(name, backend) for backend in BACKENDS_HERE for name in SPARSE if name in KINDS or backend == BACKENDS_HERE[0]]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_backends_match_the_reference(name, backend):
    """Outputs and gradients of the method's objective match those of the reference backend."""
    totals, grads, answers = [], [], []
    for way in ("reference", backend):
        model, flags = build(name, expert_backend=way, dropout=0.0)
        assert all(layer.experts.backend == way for _, layer in moe_layers(model))
        torch.manual_seed(5)
        totals.append(backward(model, flags, STEPS // 2, seed=0).total.item())
        grads.append({parameter: p.grad for parameter, p in model.named_parameters() if p.grad is not None})
        answers.append([answer(model, k=k) for k in (1, 2, E)])
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    assert grads[0].keys() == grads[1].keys()
    for parameter, wanted in grads[0].items():
        assert torch.allclose(grads[1][parameter], wanted, rtol=1e-4, atol=1e-5 * max(1.0, wanted.abs().max().item())), parameter
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-4) for one, other in zip(*answers, strict=True))


CHOOSING = [name for name in ROUTERS if name != "none"]  # which is for methods that draw experts themselves


@pytest.mark.parametrize("name", CHOOSING)
def test_router_of_a_language_model_does_not_see_later_tokens(name):
    """In evaluation; and reading the text in pieces gives the same logits."""
    model, _ = build("smoe", gate_name=name)
    tokens, _ = text(100)
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 256
    one, two = (answer(model, k=2, tokens=given) for given in (tokens, other))
    assert torch.allclose(one[:, :4], two[:, :4], atol=1e-5) and (one[:, 4:] - two[:, 4:]).abs().max() > 0.1
    cache, parts = None, []
    with torch.no_grad():
        for part in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:]):
            logits, cache = model.read(part, cache)
            parts.append(logits)
        whole, again = model.read(tokens)[0], model.read(tokens)[0]
    assert not torch.equal(whole, again) or torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)  # the router draws, or


@pytest.mark.parametrize("name", CHOOSING)
def test_router(name, tmp_path):
    """At every k a router chooses k different experts per token, differentiably in its trained parameters, and it is saved and loaded."""

    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        ffn = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        return moefy(nn.Sequential(nn.Embedding(50, 16), ffn), SMoEConfig(num_experts=E, top_k=2, router=name))

    model, tokens = made(0), torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(1))
    ((_, layer),) = moe_layers(model)
    for k in range(1, E + 1):
        for mode in (True, False):
            set_top_k(model.train(mode), k)
            set_progress(model, 1, 2)
            loss = model(tokens).square().sum() + auxiliary_loss(model)
            assert layer.assigned.dtype == torch.int64 and layer.assigned.shape[0] == 21 and layer.assigned.shape[1] >= k
            chosen = [[e for e in row if e >= 0] for row in layer.assigned.tolist()]
            assert all(len(set(row)) == len(row) and set(row) <= set(range(E)) for row in chosen)
            assert layer.variable or all(len(row) >= k for row in chosen)
            assert torch.isfinite(loss)
    model.train()
    (model(tokens).square().sum() + auxiliary_loss(model)).backward()
    assert all((p.grad is not None) == p.requires_grad for p in layer.router.parameters())
    save_model(model, tmp_path)
    again = load_weights(made(2), tmp_path).eval()
    set_top_k(again, get_top_k(model))
    torch.manual_seed(3)
    expected = model.eval()(tokens)
    torch.manual_seed(3)
    assert torch.equal(again(tokens), expected)
