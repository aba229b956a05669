"""Transformer-XL against a slow transcription of its equations; no attention to the future, no gradient into the memory."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import mem_transformer
from mem_transformer import (
    DROPOUT_PLACES,
    KeyValueCache,
    MemTransformerLM,
    RelativeAttentionCPU,
    TransformerXLConfig,
    relative_attention_sdpa,
)

SIZES = {"n_token": 7, "n_layer": 2, "n_head": 2, "d_model": 8, "d_head": 3, "d_inner": 10, "mem_len": 6, "init_std": 0.4}
EMBEDDINGS = {"plain": {}, "same_length": {"same_length": True}, "clamp": {"clamp_len": 2}, "both": {"same_length": True, "clamp_len": 3}}


@pytest.fixture
def float64():
    """Makes float64 the default dtype (memory is still kept in float32)."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(**settings) -> MemTransformerLM:
    torch.manual_seed(0)
    model = MemTransformerLM(TransformerXLConfig(**{**SIZES, **settings})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.4)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, SIZES["n_token"], (batch, length), generator=torch.Generator().manual_seed(seed))


# the transcription, for one lane


def layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return np.array([(row - row.mean()) / np.sqrt(row.var() + 1e-5) * gain + bias for row in x])


def position(distance: int, c: TransformerXLConfig) -> np.ndarray:
    """R_{i-j}: sines, then cosines; distances beyond clamp_len count as clamp_len."""
    distance = min(distance, c.clamp_len) if c.clamp_len > 0 else distance
    angles = [distance / 10000 ** (2 * n / c.d_model) for n in range(c.d_model // 2)]
    return np.array([math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles])


def attend(w: dict, name: str, x: np.ndarray, context: np.ndarray, c: TransformerXLConfig) -> np.ndarray:
    """arXiv 1901.02860, section 3.3: A_ij = (q_i + u) k_j + (q_i + v) W_R R_{i-j} over the keys j that i sees, over sqrt(d_head).

    i sees j at distance 0 <= i - j; with same_length only i - j < mem_len, itself included. That is what the official mask amounts to:
    with klen > mem_len it hides j <= i + mlen - mem_len (j counted from the start of the memory), else nothing, where no distance
    reaches mem_len anyway.
    """
    memory, heads = len(context) - len(x), []
    q_weight, k_weight, v_weight = np.split(w[f"{name}.qkv.weight"], 3)
    for h in range(c.n_head):
        rows = slice(h * c.d_head, (h + 1) * c.d_head)
        u, v, output = w["content_bias"][h], w["position_bias"][h], []
        for i in range(len(x)):
            seen = [j for j in range(len(context)) if i + memory >= j and (not c.same_length or i + memory - j < c.mem_len)]
            q = q_weight[rows] @ x[i]
            scores = []
            for j in seen:
                k, r = k_weight[rows] @ context[j], w[f"{name}.position.weight"][rows] @ position(i + memory - j, c)
                scores.append(((q + u) @ k + (q + v) @ r) / math.sqrt(c.d_head))
            p = np.exp(np.array(scores) - max(scores))
            output.append(sum(p_j * (v_weight[rows] @ context[j]) for p_j, j in zip(p / p.sum(), seen, strict=True)))
        heads.append(output)
    return np.concatenate(np.array(heads), -1) @ w[f"{name}.out.weight"].T


def feed_forward(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    hidden = np.maximum(x @ w[f"{name}.core.0.weight"].T + w[f"{name}.core.0.bias"], 0)
    return hidden @ w[f"{name}.core.3.weight"].T + w[f"{name}.core.3.bias"]


def transcription(model: MemTransformerLM, lane: np.ndarray, memory: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Symbols [T], memory of each layer [M, D] -> logits [T, V] and the next memory."""
    c, w = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    states = [w["embedding.weight"][lane] * math.sqrt(c.d_model)]
    for n in range(c.n_layer):
        name = f"layers.{n}"
        norms = [(w[f"{name}.{part}.weight"], w[f"{name}.{part}.bias"]) for part in ("attention_norm", "feed_forward_norm")]
        x, context = states[-1], np.concatenate([memory[n], states[-1]])
        if c.pre_lnorm:
            context = layer_norm(context, *norms[0])
            x = x + attend(w, f"{name}.attention", context[len(memory[n]) :], context, c)
            states.append(x + feed_forward(w, f"{name}.feed_forward", layer_norm(x, *norms[1])))
        else:
            x = layer_norm(x + attend(w, f"{name}.attention", x, context, c), *norms[0])
            states.append(layer_norm(x + feed_forward(w, f"{name}.feed_forward", x), *norms[1]))
    kept = [np.concatenate([old, new]) for old, new in zip(memory, states, strict=True)]
    return states[-1] @ w["head.weight"].T + w["head.bias"], [rows[max(len(rows) - c.mem_len, 0) :] for rows in kept]


SEGMENTS = {
    "no_memory": (0, [5, 5]),
    "growing": (8, [3, 3, 3, 3]),
    "segment_longer_than_memory": (3, [7, 7]),
    "one_position": (4, [1, 1, 1, 1, 1, 1]),
    "uneven": (6, [5, 2, 4, 1]),
    "equal": (4, [4, 4, 4]),
}


# without memory same_length leaves nothing to see, and has a test of its own
COMBINATIONS = [(e, s) for e in EMBEDDINGS for s in SEGMENTS if s != "no_memory" or "same_length" not in EMBEDDINGS[e]]


@pytest.mark.parametrize(("embeddings", "segments"), COMBINATIONS)
@pytest.mark.parametrize("pre_lnorm", [False, True], ids=["post", "pre"])
def test_model_is_the_transcription(pre_lnorm, embeddings, segments, float64):
    mem_len, lengths = SEGMENTS[segments]
    model, memory, cache = build(pre_lnorm=pre_lnorm, mem_len=mem_len, **EMBEDDINGS[embeddings]), None, None
    for index, length in enumerate(lengths):
        inputs, targets = tokens(2, length, index), tokens(2, length, index + 50)
        before = memory or model.initial_memory(2)
        losses, memory, _ = model(inputs, targets, memory)
        logits, _ = model.logits(inputs, before)
        hidden, _ = model.hidden(inputs, before)
        read, cache = model.read(inputs, cache)
        for lane in range(2):
            expected, expected_memory = transcription(model, inputs[lane].numpy(), [part[lane].numpy() for part in before])
            np.testing.assert_allclose(model.head(hidden[lane]).detach().numpy(), expected, rtol=0, atol=1e-10)
            np.testing.assert_allclose(logits[lane].detach().numpy(), expected, rtol=0, atol=1e-5)
            np.testing.assert_allclose(read[lane].numpy(), expected, rtol=0, atol=1e-5)
            log_p = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
            np.testing.assert_allclose(losses[lane].detach().numpy(), -log_p[range(length), targets[lane]], rtol=0, atol=1e-5)
            for ours, theirs in zip(memory, expected_memory, strict=True):
                assert ours[lane].shape == theirs.shape
                np.testing.assert_allclose(ours[lane].numpy(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("T", [1, 4, 9])
@pytest.mark.parametrize("mem_len", [1, 3, 6])
def test_same_length_sees_mem_len_positions(T, mem_len, float64):
    model = build(n_layer=1, same_length=True, mem_len=mem_len)
    memory = tuple(torch.randn(1, mem_len, 8, requires_grad=True) for _ in range(2))
    hidden, _ = model.hidden(tokens(1, T), memory)
    for i in range(T):
        (grad,) = torch.autograd.grad(hidden[0, i].square().sum(), memory[0], retain_graph=True)
        seen = grad[0].abs().sum(-1) > 0
        assert seen.tolist() == [i + mem_len - j < mem_len for j in range(mem_len)]


def test_same_length_without_memory_is_refused():
    """With mem_len = 0 a position would attend to nothing, not even itself."""
    with pytest.raises(ValueError, match="mem_len must not be 0"):
        build(same_length=True, mem_len=0)


@pytest.mark.parametrize("settings", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("pre_lnorm", [False, True], ids=["post", "pre"])
def test_no_position_sees_the_future_or_another_lane(pre_lnorm, settings, float64):
    model = build(pre_lnorm=pre_lnorm, **settings)
    _, memory = model.hidden(tokens(2, 4, 1))
    inputs = tokens(2, 6)
    before, _ = model.hidden(inputs, memory)
    for t in range(6):
        changed = inputs.clone()
        changed[0, t:] = (changed[0, t:] + 1) % SIZES["n_token"]
        after, _ = model.hidden(changed, memory)
        assert torch.equal(after[0, :t], before[0, :t]) and torch.equal(after[1], before[1])
        assert ((after[0, t:] - before[0, t:]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("pre_lnorm", [False, True], ids=["post", "pre"])
def test_segments_with_enough_memory_are_one_long_segment(pre_lnorm):
    model, inputs, memory, parts = build(pre_lnorm=pre_lnorm, mem_len=20), tokens(2, 12), None, []
    for part in inputs.split([5, 1, 4, 2], 1):
        hidden, memory = model.hidden(part, memory)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden(inputs)[0], rtol=1e-5, atol=1e-5)


# memory


@pytest.mark.parametrize("mem_len", [0, 2, 5])
def test_memory_is_detached_float32_and_never_longer_than_mem_len(mem_len):
    model, memory = build(mem_len=mem_len).train(), None
    for seen in (3, 6, 9):
        with torch.autocast("cpu", torch.bfloat16):
            hidden, memory = model.hidden(tokens(2, 3), memory)
        assert hidden.requires_grad and len(memory) == 3
        for part in memory:
            assert part.shape == (2, min(seen, mem_len), 8) and part.dtype == torch.float32
            assert not part.requires_grad and part.grad_fn is None


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_reading_on_is_the_same_with_keys_and_values_kept(precision):
    """Also byte by byte beyond the length of any buffer, and in segments of varying length."""
    model, memory, cache = build(mem_len=6), None, None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        for index, length in enumerate([3, *[1] * 60, 20, 2, 1, 9]):
            inputs = tokens(2, length, index)
            logits, memory = model.logits(inputs, memory)
            read, cache = model.read(inputs, cache)
            torch.testing.assert_close(read, logits, **({"rtol": 2e-2, "atol": 2e-2} if precision == torch.bfloat16 else {}))
    assert cache[0].length <= 4 * (6 + 20)
    with pytest.raises(RuntimeError, match="for evaluation"):
        model.train().read(inputs)


@pytest.mark.parametrize("pre_lnorm", [False, True])
def test_forgotten_positions_leave_no_trace(pre_lnorm, float64):
    """However many positions are read at once, each attends as one that is read alone, also while the buffers move."""
    model = build(mem_len=6, same_length=True, pre_lnorm=pre_lnorm)
    kept, alone = None, None
    for index in range(40):
        if kept:
            for position in tokens(2, index % 9, 100 + index).split(1, 1):
                model.read(position, kept)
            for cached in kept:
                cached.forget(index % 9)
        together, wrong = tokens(2, 1 + index % 5, index), tokens(2, 3, index)
        read, kept = model.read(torch.cat([together, wrong], 1), kept)
        for cached in kept:
            cached.forget(3)
        for place, position in enumerate(together.split(1, 1)):
            expected, alone = model.read(position, alone)
            torch.testing.assert_close(read[:, place], expected[:, 0], rtol=0, atol=1e-12)
    for count in (-1, KeyValueCache.SPARE + 1):
        with pytest.raises(ValueError, match="cannot be forgotten"):
            kept[0].forget(count)
    forgotten = 0
    with pytest.raises(ValueError, match="the memory must be complete"):
        for _ in range(alone[0].length):
            kept[0].forget(1)
            forgotten += 1
    assert forgotten >= KeyValueCache.SPARE - 3 and kept[0].length >= model.mem_len


def test_evaluation_may_set_another_memory_length():
    model = build(mem_len=2)
    model.mem_len = 5
    _, memory = model.hidden(tokens(1, 9))
    assert memory[0].shape == (1, 5, 8) and model.config.mem_len == 2


# the two routes of attention


def attention_inputs(T, M, same_length=False, heads=2, lanes=2, width=3, dtype=torch.float64):
    torch.manual_seed(0)
    query, key = (heads, lanes, T, width), (heads, lanes, M + T, width)
    shapes = [query, query, key, key, (heads, M + T, width)]
    leaves = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    distance = torch.arange(T)[:, None] + M - torch.arange(M + T)
    hidden = (distance < 0) | (distance >= 3 if same_length else False)
    return leaves, torch.zeros(T, M + T, dtype=dtype).masked_fill(hidden, -math.inf)


def cpu_attention(*inputs):
    return RelativeAttentionCPU.apply(*inputs)[0]


LENGTHS = [(1, 0), (1, 3), (2, 0), (4, 0), (3, 5), (5, 2)]


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize(("T", "M"), LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2)], ids=str)
def test_cpu_function_and_sdpa_agree(dtype, tolerance, T, M, same_length):
    results = []
    for route, used in ((cpu_attention, dtype), (lambda *inputs: relative_attention_sdpa(*inputs, 0.0), torch.float64)):
        leaves, mask = attention_inputs(T, M, same_length, dtype=dtype)
        y = route(*(leaf.to(used) for leaf in leaves), mask.to(used))
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=used).sin().view(y.shape))
        results.append([tensor.detach().double() for tensor in (y, *(leaf.grad for leaf in leaves))])
    for ours, expected in zip(*results, strict=True):
        # the query of a position that sees one key has no gradient: rounding is measured against the largest of all gradients
        assert (ours - expected).norm() <= tolerance * max(expected.norm(), 1.0)


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize(("T", "M"), LENGTHS[:1] + LENGTHS[3:])
def test_gradcheck_of_the_cpu_function(T, M, same_length):
    leaves, mask = attention_inputs(T, M, same_length, lanes=1, width=2)
    assert gradcheck(lambda *inputs: cpu_attention(*inputs, mask), leaves)


def test_second_derivative_is_refused_by_the_cpu_function_and_right_in_sdpa():
    leaves, mask = attention_inputs(2, 1, heads=1, lanes=1, width=2)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradgradcheck(lambda *inputs: cpu_attention(*inputs, mask), leaves)
    assert gradgradcheck(lambda *inputs: relative_attention_sdpa(*inputs, mask, 0.0), leaves)


@pytest.mark.parametrize(("dropatt", "training", "sdpa"), [(0.5, True, True), (0.5, False, False), (0.0, True, False)])
def test_attention_dropout_takes_sdpa(dropatt, training, sdpa, monkeypatch):
    calls = []
    monkeypatch.setattr(mem_transformer, "relative_attention_sdpa", lambda *a: calls.append(a[-1]) or relative_attention_sdpa(*a))
    model = build(dropatt=dropatt, dropout=0.0).train(training)
    first, second = (model.hidden(tokens(2, 5))[0] for _ in range(2))
    assert calls == ([dropatt] * 4 if sdpa else [])
    assert torch.equal(first, second) != sdpa


def test_dropout_acts_at_one_place_or_at_all():
    everywhere = {"dropout", *(f"layers.{i}.{name}" for i in (0, 1) for name in ("attention_dropout", "feed_forward.core.2", "dropout"))}
    found = {place: set() for place in (None, *DROPOUT_PLACES)}
    for place, names in found.items():
        model = MemTransformerLM(TransformerXLConfig(**SIZES, dropout=0.3, dropout_only=place))
        names |= {name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p == 0.3}
    assert found.pop(None) == everywhere == set().union(*found.values()) and sum(map(len, found.values())) == len(everywhere)
    assert found["hidden"] == {"layers.0.feed_forward.core.2", "layers.1.feed_forward.core.2"} and found["embedding"] == {"dropout"}
    with pytest.raises(ValueError, match="choose one of embedding, attention, hidden, output"):
        TransformerXLConfig(**SIZES, dropout_only="heads")


def test_routes_agree_in_the_whole_model(monkeypatch):
    model = build(dropout=0.0).train()
    memory = model.hidden(tokens(2, 4, 1))[1]
    results = []
    for _ in range(2):
        model.zero_grad()
        losses, _, _ = model(tokens(2, 5), tokens(2, 5, 3), memory)
        losses.sum().backward()
        results.append({"loss": losses.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}})
        monkeypatch.setattr(RelativeAttentionCPU, "apply", lambda *inputs: (relative_attention_sdpa(*inputs, 0.0), inputs[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
def test_model_may_be_of_another_dtype(dtype, tolerance):
    results = []
    for model in (build(), build().to(dtype)):
        first, memory = model.hidden(tokens(2, 3))
        results.append(torch.cat([first, model.hidden(tokens(2, 4), memory)[0]], 1).float())
    assert first.dtype == dtype
    assert (results[1] - results[0]).norm() < tolerance * results[0].norm()


# making a model


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_weights(tied):
    model = build(tie_weight=tied)
    assert (model.head.weight is model.embedding.weight) == tied
    untied = sum(tensor.numel() for tensor in model.state_dict().values())
    assert sum(parameter.numel() for parameter in model.parameters()) == untied - (7 * 8 if tied else 0)
    model(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))[0].sum().backward()
    assert (model.embedding.weight.grad[1:].abs().sum() > 0) == tied  # symbols that were not read learn through the head only
    assert model.head.weight.grad.abs().sum(1).gt(0).all()


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_initialisation(std):
    torch.manual_seed(0)
    model = MemTransformerLM(TransformerXLConfig(200, n_layer=3, n_head=8, d_model=64, d_head=16, d_inner=128, init_std=std))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        else:
            mean, n = 1.0 if "norm" in name else 0.0, parameter.numel()
            assert abs(parameter.mean() - mean) < 5 * std / n**0.5, name
            assert parameter.std().item() == pytest.approx(std, rel=5 / (2 * n) ** 0.5), name
