"""Adaptive embedding, adaptive and sampled softmax: against their definitions, against torch's own, and in runs on a text of tokens."""

import json
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from data import prepare
from smoe_dropout.io import from_official, load_weights, save_model, to_official
from tests import tiny
from tests.harness.test_flops import LENGTHS, counted
from tests.harness.test_parallel import assert_same, run_two
from tests.harness.test_resume import die
from tests.tiny import parse
from utils.cli.train import refuse_sizes
from utils.data.corpus import Corpus
from utils.data.meta import Tokens
from utils.errors import UserError
from utils.flags.memory import least_parameters
from utils.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, SampledSoftmax
from utils.models.build import build_model
from utils.models.flops import parameter_counts
from utils.models.registry import Shape
from utils.models.transformer_xl import forward_flops

V, D, CUTOFFS = 30, 12, (6, 10, 24)
SPANS = list(zip((0, *CUTOFFS), (*CUTOFFS, V), strict=True))
EVERY_CLUSTER = torch.tensor([[0, 25, 7, 5, 29], [10, 6, 3, 23, 3]])
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
KINDS = [
    {"div_val": 1},
    {"div_val": 2},
    {"div_val": 2, "tied_projections": False},
    {"div_val": 2, "tied_weight": False},
    {"div_val": 1, "tied_weight": False},
]


def built(div_val: int, std: float = 0.5, **how) -> tuple[AdaptiveEmbedding, AdaptiveSoftmax]:
    """Both with weights and biases that all matter."""
    torch.manual_seed(div_val)
    sizes = (V, D, CUTOFFS, div_val, std, std)
    embedding = AdaptiveEmbedding(*sizes)
    head = AdaptiveSoftmax(*sizes, embedding=embedding, **how)
    for bias in (*head.biases, head.cluster_bias):
        nn.init.normal_(bias, 0.0, std)
    return embedding, head


def maps(module: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    """Table [V, E] and projection [D, E] of each cluster."""
    tables, projections = ([array.detach().double().numpy() for array in given] for given in (module.tables, module.projections))
    if not projections:
        return [(tables[0][begin:end], np.eye(D)) for begin, end in SPANS]
    return list(zip(tables, projections, strict=True))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_p_by_definition(head: AdaptiveSoftmax, hidden: np.ndarray) -> np.ndarray:
    """log p of every symbol [..., V]; the logit of cluster i is the i-th from the end."""
    biases = np.concatenate([bias.detach().double().numpy() for bias in head.biases])
    within = [hidden @ projection @ table.T + biases[slice(*span)] for (table, projection), span in zip(maps(head), SPANS, strict=True)]
    weight, bias = (value.detach().double().numpy() for value in (head.cluster_weight, head.cluster_bias))
    clusters = hidden @ maps(head)[0][1] @ weight.T + bias
    first = log_softmax(np.concatenate([within[0], clusters], -1))
    parts = [first[..., : CUTOFFS[0]]]
    for i in range(1, len(SPANS)):
        parts.append(first[..., [first.shape[-1] - i]] + log_softmax(within[i]))
    return np.concatenate(parts, -1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_are_those_of_the_definition(kind):
    embedding, head = built(**kind)
    x_BTD = torch.randn(2, 5, D)
    log_p = head(x_BTD)
    np.testing.assert_allclose(log_p.detach().numpy(), log_p_by_definition(head, x_BTD.double().numpy()), **CLOSE)
    np.testing.assert_allclose(log_p.exp().sum(-1).detach().numpy(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(head(x_BTD[0, 0]).detach().numpy(), log_p[0, 0].detach().numpy(), **CLOSE)
    whole = np.concatenate([table @ projection.T for table, projection in maps(embedding)])
    np.testing.assert_allclose(embedding(EVERY_CLUSTER).detach().numpy(), whole[EVERY_CLUSTER], **CLOSE)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("targets_BT", [EVERY_CLUSTER, EVERY_CLUSTER % 6, EVERY_CLUSTER % 4 + 6], ids=["all", "first", "second"])
def test_losses_and_gradients_are_those_of_all_logits(kind, targets_BT):
    """Where clusters are empty, too: their parameters have a gradient of zeros, which data parallelism needs."""
    embedding, head = built(**kind)
    parameters = list(nn.ModuleList([embedding, head]).parameters())
    x_BTD = embedding(targets_BT)
    losses_BT, none = head.losses(x_BTD, targets_BT)
    found = torch.autograd.grad(losses_BT.square().sum(), parameters, retain_graph=True)
    head.full_logits = True
    again_BT, log_p_BTV = head.losses(x_BTD, targets_BT)
    expected = torch.autograd.grad(again_BT.square().sum(), parameters)
    assert none is None and losses_BT.shape == targets_BT.shape and losses_BT.dtype == torch.float32
    torch.testing.assert_close(losses_BT, -log_p_BTV.gather(-1, targets_BT[..., None])[..., 0], **CLOSE)
    torch.testing.assert_close(again_BT, losses_BT, **CLOSE)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if kind["div_val"] > 1 and targets_BT.max() < 6:
        assert found[0].any() and not any(gradient.any() for gradient in found[1:4])  # of the embedding's tables


@pytest.mark.parametrize("div_val", [1, 2])
def test_without_biases_it_is_torchs_adaptive_softmax(div_val):
    """Whose clusters are in the other order, and which has a projection less and, with div_value 1, more."""
    _, head = built(div_val, tied_weight=False, tied_projections=False)
    for bias in (*head.biases, head.cluster_bias):
        nn.init.zeros_(bias)
    theirs = nn.AdaptiveLogSoftmaxWithLoss(D, V, list(CUTOFFS), div_value=float(div_val))
    tables = list(head.tables) if div_val > 1 else list(head.tables[0].split(head.sizes))
    projections = list(head.projections) or [torch.eye(D)] * len(tables)
    composed = {"head.weight": torch.cat([tables[0], head.cluster_weight.flip(0)]) @ projections[0].T}
    for i, (table, projection) in enumerate(zip(tables[1:], projections[1:], strict=True)):
        composed |= {f"tail.{i}.0.weight": projection.T, f"tail.{i}.1.weight": table}
    x_BTD = torch.randn(2, 5, D, requires_grad=True)
    output, _ = torch.func.functional_call(theirs, composed, (x_BTD.flatten(0, 1), EVERY_CLUSTER.flatten()))
    losses_BT, _ = head.losses(x_BTD, EVERY_CLUSTER)
    torch.testing.assert_close(losses_BT.flatten(), -output, **CLOSE)
    leaves, weights_N = [x_BTD, *head.tables, *head.projections, head.cluster_weight], torch.randn(10)
    found = torch.autograd.grad((losses_BT.flatten() * weights_N).sum(), leaves)
    for one, other in zip(found, torch.autograd.grad((-output * weights_N).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_what_is_tied_is_shared():
    embedding, head = built(2)
    assert all(one is other for one, other in zip(head.tables, embedding.tables, strict=True))
    assert [one is other for one, other in zip(head.projections, embedding.projections, strict=True)] == [False, True, True, True]
    embedding, head = built(2, tied_weight=False, tied_projections=False)
    assert not {*map(id, embedding.parameters())} & {*map(id, head.parameters())}
    assert [tuple(table.shape) for table in head.tables] == [(6, 12), (4, 6), (14, 3), (6, 1)]


def test_embeddings_and_losses_are_float32_under_autocast():
    embedding, head = built(2)
    with torch.autocast("cpu", torch.bfloat16):
        x_BTD = embedding(EVERY_CLUSTER)
        losses_BT, _ = head.losses(x_BTD, EVERY_CLUSTER)
        assert x_BTD.dtype == losses_BT.dtype == head(x_BTD).dtype == torch.float32
    torch.testing.assert_close(losses_BT, head.losses(embedding(EVERY_CLUSTER), EVERY_CLUSTER)[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("wrong", [(), (0, 5), (5, 5), (9, 5), (5, 30)], ids=str)
def test_clusters_without_symbols_or_width_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        AdaptiveEmbedding(V, D, wrong, 1, 0.1)
    with pytest.raises(ValueError, match="at least 1"):
        AdaptiveEmbedding(V, D, CUTOFFS, 3, 0.1)


# sampled softmax


def sampled(samples: int) -> tuple[SampledSoftmax, Tensor, Tensor]:
    """A head in training, hidden states [B, T, D], and targets."""
    torch.manual_seed(1)
    linear = nn.Linear(D, V)
    return SampledSoftmax(linear, samples), torch.randn(2, 5, D, requires_grad=True), EVERY_CLUSTER


def test_symbols_are_drawn_log_uniformly_and_included_as_often_as_said():
    head, _, _ = sampled(3)
    p = np.log((np.arange(V) + 2) / (np.arange(V) + 1)) / np.log(V + 1)
    expected = 1 - (1 - p) ** 6
    np.testing.assert_allclose(head.log_included(torch.arange(V)).exp().numpy(), expected, rtol=1e-5)
    draws = [head.draw(torch.device("cpu")) for _ in range(4000)]
    share = torch.cat(draws).bincount(minlength=V).double().numpy() / len(draws)
    np.testing.assert_array_less(abs(share - expected), 5 * np.sqrt(expected * (1 - expected) / len(draws)))
    assert all(len(drawn) == len(drawn.unique()) <= 6 for drawn in draws)


def test_sampled_loss_by_hand():
    """Over the target and the drawn symbols; a drawn target does not count twice."""
    head, x_BTD, targets_BT = sampled(4)
    torch.manual_seed(7)
    losses_BT, logits = head.losses(x_BTD, targets_BT)
    torch.manual_seed(7)
    again_BT, _ = head.losses(x_BTD, targets_BT)
    torch.manual_seed(7)
    drawn = head.draw(x_BTD.device).tolist()
    assert logits is None and torch.equal(losses_BT, again_BT) and {*drawn} & {*targets_BT.flatten().tolist()}
    corrected = (head(x_BTD) - head.log_included(torch.arange(V))).detach().double().numpy()
    for b, t in np.ndindex(2, 5):
        target = targets_BT[b, t].item()
        among = corrected[b, t, [target, *(symbol for symbol in drawn if symbol != target)]]
        assert losses_BT[b, t].item() == pytest.approx(np.log(np.exp(among).sum()) - among[0], rel=1e-5)


def test_sampled_sums_are_unbiased_and_the_loss_tends_to_that_of_all():
    head, x_BTD, targets_BT = sampled(5)
    logits_NR = [head._sampled(x_BTD.flatten(0, 1), targets_BT.flatten()).detach() for _ in range(3000)]
    others_N = torch.stack([one[:, 1:].exp().sum(1) for one in logits_NR]).mean(0)
    probable = head(x_BTD).exp().flatten(0, 1).scatter(1, targets_BT.view(-1, 1), 0.0).sum(1)
    torch.testing.assert_close(others_N, probable.detach(), rtol=0.05, atol=0.0)
    whole = F.cross_entropy(head(x_BTD).flatten(0, 1), targets_BT.flatten())
    expected, errors = torch.autograd.grad(whole, x_BTD)[0], []
    for samples in (2, 8, 32, 5000):
        head.samples = samples
        gradients = [torch.autograd.grad(head.losses(x_BTD, targets_BT)[0].mean(), x_BTD)[0] for _ in range(20)]
        errors.append(sum((gradient - expected).norm().item() for gradient in gradients) / expected.norm().item() / 20)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < errors[-2], errors
    torch.testing.assert_close(head.losses(x_BTD, targets_BT)[0].mean(), whole, **CLOSE)


def test_evaluation_is_over_all_symbols():
    head, x_BTD, targets_BT = sampled(2)
    losses_BT, logits_BTV = head.eval().losses(x_BTD, targets_BT)
    torch.testing.assert_close(logits_BTV, head(x_BTD))
    expected_N = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    torch.testing.assert_close(losses_BT.flatten(), expected_N)


# models

OFFICIAL = (
    *("word_emb.emb_layers.{}.weight", "word_emb.emb_projs.{}"),
    *("crit.out_layers.{}.weight", "crit.out_layers.{}.bias", "crit.out_projs.{}"),
)
WORDS = [f"word{index}" for index in range(40)]
VOCABULARY = Tokens("words", len(WORDS), "0" * 64, None)
ADAPTIVE = {"adaptive": True, "cutoffs": "8,16,39", "div_val": 2}  # the last cluster is one token, which the text does not have
SAMPLED = {"sample_softmax": 4}
RUN = {"method": "dense", "max_step": 12, "eval_interval": 4, "log_interval": 1, "dropout": 0.1}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A prepared text of words, the frequent ones first in the vocabulary."""
    root = tmp_path_factory.mktemp("tokens")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (root / "tokenizer").mkdir()
    tokenizer.save(str(root / "tokenizer" / "tokenizer.json"))
    draw = np.random.default_rng(0)
    (root / "text").write_text(" ".join(draw.choice(WORDS[:39], 3000, p=(p := 1 / np.arange(1, 40)) / p.sum())))
    prepare.main(["words", "--source", str(root / "text"), "--tokenizer", str(root / "tokenizer"), "--out", str(root / "words")])
    return root / "words"


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "adaptive"
    tiny.completed(tiny.flags(text, folder, **RUN, **ADAPTIVE))
    return folder


def model_of(**changes) -> nn.Module:
    return build_model(parse(tiny.flags(Path("data"), Path("run"), **{"method": "dense", **changes})), VOCABULARY)


def test_an_adaptive_run_resumes_bit_for_bit(text, finished, tmp_path):
    arguments = tiny.flags(text, tmp_path / "run", **RUN, **ADAPTIVE)
    assert tiny.run(arguments, partial(die, "step", 7, True)).code == -signal.SIGKILL
    assert "resumed at step 4" in tiny.completed(arguments).out
    tiny.same_run(tmp_path / "run", finished)
    result = tiny.read_json(finished / "result.json")
    assert result["preset_settings"].items() >= ADAPTIVE.items() and result["quality"][0]["test_bits_per_byte"] > 0


def test_a_sampled_run_resumes_bit_for_bit(text, tmp_path):
    whole, arguments = (tiny.flags(text, tmp_path / name, **RUN, **SAMPLED) for name in ("whole", "run"))
    assert tiny.run(arguments, partial(die, "step", 7, True)).code == -signal.SIGKILL
    for words in (arguments, whole):
        tiny.completed(words)
    tiny.same_run(tmp_path / "run", tmp_path / "whole")


def test_two_processes_give_the_losses_of_one(text, tmp_path):
    changes = {**RUN, **ADAPTIVE, "dropout": 0.0, "max_step": 4}
    tiny.completed(tiny.flags(text, tmp_path / "one", **changes))
    both = run_two(tiny.flags(text, tmp_path / "two", **changes), timeout=20)
    assert [run.code for run in both] == [0, 0], both[0].err + both[1].err
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("changes", [{"method": "sandwich"}, {"method": "thor"}, {"teacher": True}], ids=str)
def test_objectives_that_read_logits_have_them(changes, text, finished, tmp_path):
    start = {"start_from": finished, "teacher": finished} if changes.pop("teacher", False) else ADAPTIVE
    flags = {**RUN, **start, **changes, "max_step": 2, "eval_interval": 2}
    tiny.completed(tiny.flags(text, tmp_path / "run", **flags))
    assert all(np.isfinite(line["loss"]) for line in tiny.metrics(tmp_path / "run", "train"))


def test_reading_with_a_cache_gives_the_losses_of_the_pass(finished, text):
    model = model_of(**ADAPTIVE).eval()
    load_weights(model, tiny.checkpoints(finished)[-1])
    tokens_BT = torch.from_numpy(Corpus.open(text).test[:60].astype(np.int64)).view(2, 30)
    losses_BT, _, logits = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
    read_BT, _ = model.read(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:])
    log_p_BTV, _ = model.read(tokens_BT[:, :-1])
    assert logits is None
    torch.testing.assert_close(read_BT, losses_BT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(-log_p_BTV.gather(-1, tokens_BT[:, 1:, None])[..., 0], read_BT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [ADAPTIVE, {**ADAPTIVE, "div_val": 1}, {**ADAPTIVE, "not_tied": True}, SAMPLED], ids=str)
def test_weights_are_saved_once_and_official_names_convert_both_ways(changes, tmp_path):
    model, other = model_of(**changes), model_of(**changes, init_std=0.1)
    save_model(model, tmp_path / "saved")
    load_weights(other, tmp_path / "saved")
    state = model.state_dict()
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())
    assert ("head.tables.0" in state) == ("adaptive" in changes)
    official = to_official(state)
    assert {*from_official(official)} == {*state}
    if changes is ADAPTIVE:
        expected = {form.format(cluster) for form in OFFICIAL for cluster in range(4)} | {"crit.cluster_weight", "crit.cluster_bias"}
        assert {name for name in official if name.startswith(("crit.", "word_emb."))} == expected


@pytest.mark.parametrize("changes", [ADAPTIVE, {**ADAPTIVE, "div_val": 1}, {"sample_softmax": 2}], ids=json.dumps)
def test_operations_and_parameters_are_counted(changes):
    """All clusters at every target, as when all logits are computed; embeddings as those of the first cluster, which all tokens are in."""
    flags = {**changes, "n_layer": 3, "d_model": 12, "d_head": 5, "mem_len": 7, "dropout": 0.0}
    model = model_of(**flags).eval()
    model.head.full_logits = True
    for lengths in LENGTHS[1:]:
        assert forward_flops(model, Shape(*lengths), None) == counted(model, *lengths)
    distinct = {id(parameter): parameter.numel() for parameter in model.parameters()}
    assert parameter_counts(model)["total"] == sum(distinct.values())


@pytest.mark.parametrize("changes", [{}, {"div_val": 1}, {"not_tied": True}], ids=str)
def test_the_bound_on_parameters_is_below_them(changes):
    flags = parse(tiny.flags(Path("data"), Path("run"), **{"method": "dense", "d_model": 64, "d_ff": 512, **ADAPTIVE, **changes}))
    total = parameter_counts(build_model(flags, VOCABULARY))["total"]
    assert 0.75 * total < least_parameters(flags) <= total


REFUSED = {
    "--cutoffs 5,9": "--cutoffs needs --adaptive",
    "--div_val 4": "--div_val needs --adaptive",
    "--untied_projections": "--untied_projections needs --adaptive",
    "--adaptive --untied_projections": "--untied_projections has no effect with --div_val 1",
    "--adaptive --div_val 0": "--div_val 0 must be at least 1",
    "--adaptive --div_val 7": "--div_val 7 leaves no width of --d_model 256 to the last cluster",
    "--adaptive --sample_softmax 3": "--adaptive and --sample_softmax 3 cannot be combined: leave out all but one",
    "--adaptive --compile": "--adaptive and --compile cannot be combined",
    "--sample_softmax 3 --compile": "--sample_softmax 3 and --compile cannot be combined",
    "--sample_softmax 0": "--sample_softmax 0 must be at least 1, or -1",
    "--sample_softmax 3 --method thor": "--sample_softmax 3 computes the logits of some tokens, and --method thor reads all",
    "--adaptive --model bert": "--adaptive has no effect with --model bert",
    "--sample_softmax 3 --model roberta": "--sample_softmax has no effect with --model roberta",
}
WRONG = ("9,5", "5,5", "0,5", "5,,9", "x", "²")
REFUSED |= {f"--adaptive --cutoffs {wrong}": f"--cutoffs {wrong}: expected ascending numbers" for wrong in WRONG}


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_flags_are_refused(words):
    with pytest.raises(UserError) as caught:
        parse(words.split())
    assert REFUSED[words] in str(caught.value)


def test_texts_without_rare_tokens_are_refused(text, tmp_path):
    words = tiny.write_corpus(tmp_path / "words")
    for changes, data, said in [
        (ADAPTIVE, words, "--adaptive is for many tokens, and .*words is a text of bytes, of which there are 256: leave it out"),
        (SAMPLED, words, "--sample_softmax 4 is for many tokens"),
        ({**ADAPTIVE, "cutoffs": "8,40"}, text, "--cutoffs 8,40 must end below 40, the number of tokens of .*: choose smaller ones"),
    ]:
        with pytest.raises(UserError, match=said):
            refuse_sizes(parse(tiny.flags(data, tmp_path / "run", method="dense", **changes)), Corpus.open(data))
