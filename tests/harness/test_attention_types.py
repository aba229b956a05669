"""--attn_type 1 to 3 against loops over positions in NumPy, and --varlen."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout.attention import expert_attention
from tests import tiny
from tests.harness.test_flags import flags, sentence
from tests.harness.test_mem_transformer import SEGMENTS, SIZES, feed_forward, layer_norm, position, tokens
from tests.harness.test_official_options import goes_on_after_kills
from tests.harness.test_parallel import LANES, SETTINGS, assert_same, run_two
from utils.data.lanes import Lanes, VariedLanes, rank_lanes
from utils.flags.memory import least_parameters
from utils.models.attention_types import AbsoluteLM, LearnedRelativeLM
from utils.models.build import build_model
from utils.models.flops import parameter_counts
from utils.models.registry import Shape
from utils.models.transformer_xl import forward_flops

ROWS = 9  # fewer than positions in some of the segments
KINDS = {1: partial(LearnedRelativeLM, rows=ROWS), 2: AbsoluteLM, 3: partial(AbsoluteLM, rows=ROWS)}


def build(kind: int, **settings) -> MemTransformerLM:
    torch.manual_seed(0)
    model = KINDS[kind](TransformerXLConfig(**{**SIZES, "dropout": 0.0, **settings})).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.4)
    return model


# the transcription, for one lane


def row(distance: int, c: TransformerXLConfig) -> int:
    """The official code keeps the last clamp_len rows of a table, and repeats the first of those that it keeps."""
    return min(distance, (min(c.clamp_len, ROWS) if c.clamp_len > 0 else ROWS) - 1)


def attend(w: dict, name: str, x: np.ndarray, context: np.ndarray, c: TransformerXLConfig, learned: bool) -> tuple[np.ndarray, np.ndarray]:
    """Output [T, D], and probabilities [H, T, K]: of ((q + u) k + q r + b) / sqrt(C) if relative, else of q k / sqrt(C)."""
    memory, heads = len(context) - len(x), []
    p = np.zeros((c.n_head, len(x), len(context)))
    q_weight, k_weight, v_weight = np.split(w[f"{name}.qkv.weight"], 3)
    for h in range(c.n_head):
        own, output = slice(h * c.d_head, (h + 1) * c.d_head), []
        for i in range(len(x)):
            seen = [j for j in range(len(context)) if i + memory >= j and (not c.same_length or i + memory - j < c.mem_len)]
            q, scores = q_weight[own] @ x[i], []
            for j in seen:
                k, score = k_weight[own] @ context[j], 0.0
                if learned:
                    d = row(i + memory - j, c)
                    score = w[f"{name}.content_bias"][h] @ k + q @ w[f"{name}.distance_keys"][d, h] + w[f"{name}.distance_bias"][d, h]
                scores.append((q @ k + score) / math.sqrt(c.d_head))
            weights = np.exp(scores) / np.exp(scores).sum()
            p[h, i, seen] = weights
            output.append(sum(weight * (v_weight[own] @ context[j]) for weight, j in zip(weights, seen, strict=True)))
        heads.append(output)
    return np.concatenate(heads, 1) @ w[f"{name}.out.weight"].T, p


def transcription(kind: int, model: MemTransformerLM, lane: np.ndarray, memory: list[np.ndarray]) -> tuple[np.ndarray, list, list]:
    """Symbols [T], memory of each layer [M, D] -> logits [T, V], states to remember, and attention probabilities of each layer."""
    c, w, probabilities = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}, []
    states = [w["embedding.weight"][lane] * math.sqrt(c.d_model)]
    for n in range(c.n_layer):
        name, context = f"layers.{n}", np.concatenate([memory[n], states[-1]])
        for j in range(len(context)):
            distance = len(context) - 1 - j  # from the end of the segment
            context[j] += w["positions"][n, row(distance, c)] if kind == 3 else position(distance, c) if (kind, n) == (2, 0) else 0
        norms = [(w[f"{name}.{part}.weight"], w[f"{name}.{part}.bias"]) for part in ("attention_norm", "feed_forward_norm")]
        x = context[len(memory[n]) :]
        normed = layer_norm(context, *norms[0]) if c.pre_lnorm else context
        y, p = attend(w, f"{name}.attention", normed[len(memory[n]) :], normed, c, kind == 1)
        probabilities.append(p)
        if c.pre_lnorm:
            x = x + y
            states.append(x + feed_forward(w, f"{name}.feed_forward", layer_norm(x, *norms[1])))
        else:
            x = layer_norm(x + y, *norms[0])
            states.append(layer_norm(x + feed_forward(w, f"{name}.feed_forward", x), *norms[1]))
    kept = [np.concatenate([old, new]) for old, new in zip(memory, states, strict=True)]
    return states[-1] @ w["head.weight"].T + w["head.bias"], [rows[max(len(rows) - c.mem_len, 0) :] for rows in kept], probabilities


@pytest.mark.parametrize("settings", [{}, {"same_length": True, "clamp_len": 3}, {"clamp_len": 20}, {"pre_lnorm": True}], ids=str)
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_model_is_the_transcription(kind, segments, settings):
    """Logits, losses, memory, probabilities, and what is read with a cache."""
    mem_len, lengths = SEGMENTS[segments]
    if settings.get("same_length") and not mem_len:
        settings = settings | {"same_length": False}
    model, memory, cache = build(kind, mem_len=mem_len, **settings), None, None
    for layer in model.layers:
        layer.attention.keep_probabilities = True
    for index, length in enumerate(lengths):
        inputs, targets = tokens(2, length, index), tokens(2, length, index + 50)
        before = memory or model.initial_memory(2)
        read, cache = model.read(inputs, cache)
        losses, memory, logits = model(inputs, targets, memory)
        for lane in range(2):
            expected, expected_memory, p = transcription(kind, model, inputs[lane].numpy(), [part[lane].numpy() for part in before])
            np.testing.assert_allclose(logits[lane].detach().numpy(), expected, rtol=0, atol=1e-5)
            np.testing.assert_allclose(model.head(model.hidden(inputs, before)[0][lane]).detach().numpy(), expected, rtol=0, atol=1e-10)
            np.testing.assert_allclose(read[lane].numpy(), expected, rtol=0, atol=1e-5)
            log_p = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
            np.testing.assert_allclose(losses[lane].detach().numpy(), -log_p[range(length), targets[lane]], rtol=0, atol=1e-5)
            for ours, theirs in zip(memory, expected_memory, strict=True):
                np.testing.assert_allclose(ours[lane].numpy(), theirs, rtol=0, atol=1e-10)
            for layer, theirs in zip(model.layers, p, strict=True):
                np.testing.assert_allclose(layer.attention.probabilities[lane].numpy(), theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    """With respect to every parameter, with memory, whose positions are learned too in type 3."""
    sizes = {"n_token": 4, "n_layer": 2, "n_head": 2, "d_model": 4, "d_head": 2, "d_inner": 3, "pre_lnorm": True}
    model = build(kind, **sizes)
    names, parameters = zip(*model.named_parameters(), strict=True)
    inputs, memory = torch.tensor([[0, 3, 1]]), tuple(torch.randn(1, 2, 4, dtype=torch.float64) for _ in range(3))
    if kind == 3:
        (gradient,) = torch.autograd.grad(model.hidden(inputs, memory)[0].square().sum(), model.positions)
        assert (gradient.abs().sum(-1) > 0).tolist() == [[True] * 5 + [False] * 4] * 2  # the segment's 3, then the memory's 2

    def hidden(*values: torch.Tensor) -> torch.Tensor:
        return functional_call(Hidden(model), {f"model.{name}": value for name, value in zip(names, values, strict=True)}, (inputs, memory))

    assert gradcheck(hidden, parameters, fast_mode=True)


class Hidden(torch.nn.Module):
    def __init__(self, model: MemTransformerLM):
        super().__init__()
        self.model = model

    def forward(self, inputs, memory):
        return self.model.hidden(inputs, memory)[0]


@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("parts", [[12], [5, 1, 4, 2], [1] * 12], ids=str)
def test_learned_distances_are_read_the_same_in_any_pieces(parts, same_length):
    """The cache may also forget what it read last, as drafts need."""
    model, text = build(1, mem_len=12, same_length=same_length).float(), tokens(2, 12)
    cache, found = None, []
    for part in text.split(parts, 1):
        if cache:
            model.read(tokens(2, 3, 9), cache)
            for cached in cache:
                cached.forget(3)
        logits, cache = model.read(part, cache)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), model.logits(text)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_only(kind):
    for rates in ({"dropout": 0.5}, {"dropatt": 0.5}):
        model = build(kind, **rates).train()
        first, second = (model.hidden(tokens(2, 5))[0] for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(*(model.eval().hidden(tokens(2, 5))[0] for _ in range(2)))
    with pytest.raises(RuntimeError, match="for evaluation"):
        model.train().read(tokens(2, 5))


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1, 0), (3, 4, 7)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_flops(kind, lengths, experts):
    """With torch's attention by matrix products, which its counter knows, and where gradients keep products for a single position."""
    model, (batch, segment, memory) = build(kind), lengths
    if experts:
        expert_attention(model, [1], 3, 0.1)
    inputs, state = tokens(batch, segment), tuple(torch.zeros(batch, memory, 8, dtype=torch.float64) for _ in range(3))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs, inputs, state)
    assert counter.get_total_flops() == forward_flops(model, Shape(*lengths), None)


# runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return tiny.write_corpus(tmp_path_factory.mktemp("data") / "words")


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory) -> dict[int, Path]:
    """A finished run of each type, with experts in attention and elsewhere."""
    found = {kind: tmp_path_factory.mktemp("runs") / str(kind) for kind in KINDS}
    for kind, folder in found.items():
        tiny.completed(
            tiny.flags(corpus, folder, attn_type=kind, method="smoe_dropout", attn_moe=True, eval_tgt_len=4, eval_interval=24, lr=1e-2)
        )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns(runs, kind):
    losses = [line["loss"] for line in tiny.metrics(runs[kind], "train")]
    result = tiny.read_json(runs[kind] / "result.json")
    assert losses[-1] < losses[0] - 1.5 and result["preset_settings"]["attn_type"] == kind
    assert all(row["test"] < 5 for row in tiny.quality(result) if row["k"] > 1)


def test_generating_and_fine_tuning(runs, tmp_path):
    """Need positions that do not move: in types 2 and 3 they are refused."""
    finished = tiny.completed(["--checkpoint", str(runs[1]), "--length", "20", "--draft_k", "1"], program="generate.py")
    assert len(finished.out_bytes) == 21
    for kind in (2, 3):
        refused = tiny.run(["--checkpoint", str(runs[kind])], program="generate.py")
        said = f"{runs[kind]} has --attn_type {kind}, whose positions move with every byte: give one of 0 or 1"
        assert (refused.code, refused.out) == (2, "") and refused.err.startswith(f"error: {said}")
        tunes = [
            "--checkpoint",
            str(runs[kind]),
            "--data",
            str(tiny.write_rows(tmp_path / "sst2", "sst2")),
            "--work_dir",
            str(tmp_path / "x"),
        ]
        refused = tiny.run(tunes, program="finetune.py")
        assert refused.code == 2 and f"--attn_type {kind}: positions are counted from the end" in refused.err
        assert not (tmp_path / "x").exists()


def test_a_run_of_type_1_is_fine_tuned(runs, tmp_path):
    rows = tiny.write_rows(tmp_path / "sst2", "sst2")
    words = ["--checkpoint", str(runs[1]), "--data", str(rows), "--work_dir", str(tmp_path / "x"), "--max_step", "2", "--device", "cpu"]
    assert "done" in tiny.completed([*words, "--max_length", "200"], program="finetune.py").out


@pytest.mark.parametrize("kind", KINDS)
def test_tables_have_a_row_for_every_position_of_training(kind):
    model = build_model(flags(f"--preset quick --method dense --attn_type {kind} --tgt_len 12 --mem_len 20 --eval_tgt_len 12"))
    tables = [tensor for name, tensor in model.named_parameters() if name.endswith(("distance_keys", "distance_bias", "positions"))]
    assert [32 in table.shape[:2] for table in tables] == [True] * {1: 2 * len(model.layers), 2: 0, 3: 1}[kind]


# --varlen


@pytest.mark.parametrize("tgt_len", [3, 40])
def test_lengths_are_distributed_as_in_the_official_code(tgt_len):
    lanes = VariedLanes(np.zeros(400_000, np.uint8), 2, tgt_len, seed=1)
    found = np.array([lanes[index][0].shape[1] for index in range(len(lanes) - 1)])
    drawn = np.random.default_rng(0)
    expected = np.array(
        [
            min(tgt_len + 15, max(5, int(drawn.normal(tgt_len if drawn.random() < 0.95 else tgt_len / 2, 5))))  # one after another
            for _ in range(20_000)
        ]
    )
    for quantile in (0, 0.02, 0.2, 0.5, 0.8, 1):
        assert abs(np.quantile(found, quantile) - np.quantile(expected, quantile)) <= 1
    assert found.mean() == pytest.approx(expected.mean(), rel=0.02)


def test_a_pass_reads_every_symbol_once_and_every_pass_has_other_lengths():
    data = np.arange(2 * 500, dtype=np.uint16)
    lanes, lengths = VariedLanes(data, 2, 20, seed=3), set()
    for step in range(100):
        if lanes.at(step) == 0:
            segments = list(lanes)
            for offset, part in enumerate(zip(*segments, strict=True)):
                assert torch.equal(torch.cat(part, 1), torch.from_numpy(data.reshape(2, 500)[:, offset : 499 + offset].astype(np.int64)))
            lengths.add(tuple(tokens.shape[1] for tokens, _ in segments))
    assert len(lengths) >= 3 and len({len(one) for one in lengths}) > 1


def test_a_segment_depends_on_seed_and_step_alone():
    """Not on the number of processes, nor on the steps before."""
    data, steps = np.random.default_rng(0).integers(0, 256, 7 * 200, np.uint8), (0, 1, 30, 31, 77)

    def read(lanes: Lanes, step: int) -> tuple[int, torch.Tensor]:
        return (index := lanes.at(step)), lanes[index][0]

    one = VariedLanes(data, 7, 16, seed=5)
    whole = {step: read(one, step) for step in range(80)}
    ranks = [VariedLanes(data, 7, 16, "cpu", rank_lanes(7, rank, 3), seed=5) for rank in range(3)]
    for step in (*steps, *reversed(steps)):
        found = [read(lanes, step) for lanes in (VariedLanes(data, 7, 16, seed=5), one)]
        found.append((ranks[0].at(step), torch.cat([read(lanes, step)[1] for lanes in ranks])))
        assert all(index == whole[step][0] and torch.equal(tokens, whole[step][1]) for index, tokens in found)
    other = VariedLanes(data, 7, 16, seed=6)
    assert [read(other, step)[1].shape for step in range(20)] != [whole[step][1].shape for step in range(20)]


def test_a_killed_run_of_varying_lengths_ends_as_if_it_had_not_been(tmp_path):
    """Across the end of a pass; evaluation is as without."""
    corpus = tiny.write_corpus(tmp_path / "words", train_bytes=4 * 180, held_out_bytes=60)
    changes = {"varlen": True, "attn_type": 3, "method": "smoe_dropout"}
    unbroken = tmp_path / "unbroken"
    tiny.completed(
        tiny.flags(
            corpus, unbroken, **{"max_step": 24, "eval_interval": 6, "save_interval": 4, "log_interval": 3, "dropout": 0.2} | changes
        )
    )
    tokens = tiny.read_json(unbroken / "result.json")["training"]["tokens"]
    assert tokens != 24 * 4 * 8 and tiny.read_json(unbroken / "result.json")["preset_settings"]["varlen"]
    goes_on_after_kills(corpus, unbroken, tmp_path / "killed", (6, 7), **changes)


def test_two_processes_draw_the_lengths_of_one(tmp_path):
    corpus = tiny.write_corpus(tmp_path / "words", train_bytes=LANES * 80)
    arguments = [tiny.flags(corpus, tmp_path / name, **SETTINGS, method="dense", attn_type=3, varlen=True) for name in ("one", "two")]
    tiny.completed(arguments[0])
    assert [finished.code for finished in run_two(arguments[1])] == [0, 0]
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("kind", KINDS)
def test_least_parameters_are_a_lower_bound(kind):
    decided = flags(f"--preset quick --method dense --attn_type {kind} --mem_len 5000")
    assert 0.9 < least_parameters(decided) / parameter_counts(build_model(decided))["total"] < 1


MISTAKES = {
    "--attn_type 4": "--attn_type 4 must be at least 0 and at most 3",
    "--model bert --method dense --attn_type 1": "--attn_type has no effect with --model bert: leave it out",
    "--model bert --method dense --varlen": "--varlen has no effect with --model bert: leave it out",
    "--varlen --compile": "--varlen draws lengths, and --compile would compile a graph for each: leave one out",
    "--varlen --tokens 1000": "--tokens 1000: with --varlen segments differ in length; use --max_step",
    "--method similarity --attn_type 2": "--attn_type 2 evaluates --method similarity by whole segments: use --eval_tgt_len 512",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_each_mistake_is_one_sentence(text):
    assert sentence(text) == f"{MISTAKES[text]} (nothing was started; --help lists all flags)"


def test_methods_that_route_by_position_work_by_whole_segments():
    assert flags("--method similarity --attn_type 2 --eval_tgt_len 512").attn_type == 2
    assert flags("--method similarity --attn_type 1").attn_type == 1
