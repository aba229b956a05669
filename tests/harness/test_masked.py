"""Masked language modelling without whole runs: masks and their order, refusals, models, operations and parameters."""

import json
from itertools import pairwise
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import smoe_dropout as sd
from smoe_dropout import moe_layers
from tests import tiny
from tests.tiny import ALONE, Place, parse
from utils.data.corpus import Corpus
from utils.data.tokenizer import Vocabulary
from utils.errors import UserError, exit_on_user_error
from utils.models.build import build_model
from utils.models.flops import active_parameters, parameter_counts
from utils.models.registry import Shape, architecture
from utils.tasks.base import Batch
from utils.tasks.masked import MaskedSequences
from utils.training.setup import pretraining_task

pytest.importorskip("transformers")

T, SEQUENCES, HELD_OUT = 10, 60, 7  # tiny.write_pieces gives so many sequences of 8 pieces, and some pieces over
VOCABULARY = Vocabulary(**tiny.VOCABULARY, **tiny.SPECIAL["bert"])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, Corpus]:
    """For each model a text without repetitions, so that every sequence is identified by its pieces."""
    root = tmp_path_factory.mktemp("pieces")
    return {model: Corpus.open(tiny.write_pieces(root / model, model, run=1)) for model in tiny.SPECIAL}


@pytest.fixture(params=tiny.SPECIAL)
def model(request) -> str:
    return request.param


def command(model: str, data: Path = Path("unused"), **changes) -> list[str]:
    return tiny.flags(data, Path("unused"), **{**tiny.ENCODER, "model": model, **changes})


def task_of(model: str, corpus: Corpus, place: Place = ALONE, **changes):
    return pretraining_task(parse(command(model, **changes)), corpus, place)


def whole(batches: list[Batch]) -> torch.Tensor:
    """Rows of tokens, places and targets side by side."""
    return torch.cat([torch.cat(batch.inputs, 1) for batch in batches])


def numbers(batches: list[Batch], pieces: np.ndarray) -> list[int]:
    """Indices of these sequences in the text, after restoring the masked pieces."""
    known = {tuple(row): index for index, row in enumerate(pieces[: len(pieces) // 8 * 8].reshape(-1, 8).tolist())}
    assert len(known) == len(pieces) // 8
    restored = torch.cat([tokens.scatter(1, places, targets) for tokens, places, targets in (batch.inputs for batch in batches)])
    return [known[tuple(row)] for row in restored[:, 1:-1].tolist()]


# masks


@pytest.mark.parametrize(
    ("length", "rate", "wanted"), [(10, 0.15, 1), (3, 0.15, 1), (10, 0.5, 4), (18, 0.2, 3), (66, 0.15, 10), (10, 0.99, 8)]
)
def test_the_places_are_a_fixed_share_of_the_pieces_and_never_the_special_ones(length, rate, wanted):
    text = np.random.default_rng(1).integers(5, 40, 20 * (length - 2) + 1, dtype=np.uint16)
    sequences = MaskedSequences(text, VOCABULARY, length, rate)
    assert (sequences.count, sequences.targets) == (20 + (length == 3), wanted)
    for index in range(20):
        tokens, places, targets = sequences.sequence(index, (3, 0))
        own = text[index * (length - 2) : (index + 1) * (length - 2)]
        assert tokens.shape == (length,) and places.shape == targets.shape == (wanted,) and {tokens.dtype, places.dtype} == {np.dtype("i8")}
        assert (np.diff(places) > 0).all() and places[0] >= 1 and places[-1] <= length - 2
        assert (tokens[0], tokens[-1]) == (2, 3) and targets.tolist() == own[places - 1].tolist()
        kept = np.delete(np.arange(1, length - 1), places - 1)
        assert tokens[kept].tolist() == own[kept - 1].tolist()


def test_of_the_places_80_percent_are_hidden_10_percent_are_any_piece_and_10_percent_stay():
    text = np.random.default_rng(1).integers(5, 40, 64 * 50, dtype=np.uint16)
    sequences, draws, size = MaskedSequences(text, VOCABULARY, 66, 0.15), 2000, 40 - len(VOCABULARY.special)
    rows = [sequences.sequence(index % 50, (7, index // 50)) for index in range(draws)]
    inputs = np.concatenate([tokens[places] for tokens, places, _ in rows])
    places, targets = (np.concatenate([row[column] for row in rows]) for column in (1, 2))

    def share_is(found: np.ndarray, p: float, sigmas: float = 4) -> None:
        assert abs(found.mean() - p) < sigmas * sqrt(p * (1 - p) / len(found)), (found.mean(), p)

    assert len(inputs) == 10 * draws
    share_is(inputs == VOCABULARY.mask, 0.8)
    share_is(inputs == targets, 0.1 + 0.1 / size)
    other = inputs[(inputs != VOCABULARY.mask) & (inputs != targets)]
    share_is((inputs != VOCABULARY.mask) & (inputs != targets), 0.1 * (1 - 1 / size))
    assert not set(other) & set(VOCABULARY.special)
    for piece in set(range(40)) - set(VOCABULARY.special):
        share_is(other == piece, 1 / size, sigmas=5)
    for place in range(1, 65):  # every place as often
        share_is(places == place, 1 / 64, sigmas=5)


def test_a_draw_is_decided_by_its_key_and_the_sequence(corpora):
    text = corpora["bert"].train
    sequences, again = (MaskedSequences(text, VOCABULARY, T, 0.5) for _ in range(2))

    def drawn(made: MaskedSequences, key: tuple[int, ...]) -> list[list[int]]:
        return [made.sequence(index, key)[1].tolist() for index in range(SEQUENCES)]

    first = drawn(sequences, (1, 0))
    assert drawn(again, (1, 0)) == first
    for other in ((1, 1), (2, 0)):
        assert sum(one == two for one, two in zip(first, drawn(sequences, other), strict=True)) < SEQUENCES / 4
    assert len(set(map(tuple, first))) > SEQUENCES / 2


# order


def test_an_epoch_has_every_sequence_once_and_the_next_one_another_order_and_other_masks(model, corpora):
    task, text = task_of(model, corpora[model], mask_rate=0.5), corpora[model].train
    epochs = [[task.next() for _ in range(15)] for _ in range(3)]
    orders = [numbers(epoch, text) for epoch in epochs]
    assert all(sorted(order) == list(range(SEQUENCES)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(SEQUENCES)]}) == 4
    masks = [dict(zip(order, whole(epoch)[:, T : T + 4].tolist(), strict=True)) for order, epoch in zip(orders, epochs, strict=True)]
    for one, two in pairwise(masks):
        assert sum(one[index] == two[index] for index in range(SEQUENCES)) < SEQUENCES / 4


def test_incomplete_sequences_and_batches_are_dropped(model, corpora):
    assert len(corpora[model].train) == SEQUENCES * 8 + 5
    task = task_of(model, corpora[model], batch_size=7)
    epochs = [numbers([task.next() for _ in range(8)], corpora[model].train) for _ in range(2)]
    assert [len(set(order)) for order in epochs] == [56, 56] and set(epochs[0]) != set(epochs[1])
    assert all(len(batch.inputs[0]) == 7 for batch in (task.next() for _ in range(9)))


def test_the_order_depends_on_the_seed_alone(model, corpora):
    corpus = corpora[model]
    first = whole([task.next() for task in [task_of(model, corpus)] for _ in range(30)])
    other = task_of(model, corpus, batch_size=10, method="thor", max_step=7, dropout=0.5)
    torch.manual_seed(5)
    assert torch.equal(whole([other.next() for _ in range(12)]), first)
    seeded = task_of(model, corpus, seed=2)
    assert numbers([seeded.next()], corpus.train) != numbers([task_of(model, corpus).next()], corpus.train)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_batch_out(model, processes, corpora):
    corpus, alone = corpora[model], task_of(model, corpora[model], batch_size=5)
    ranks = [task_of(model, corpus, Place(rank, processes), batch_size=5) for rank in range(processes)]
    for _ in range(14):  # 12 are an epoch
        one, parts = alone.next(), [task.next() for task in ranks]
        assert torch.equal(whole(parts), whole([one])) and {part.shape for part in parts} == {one.shape} == {Shape(5, T, 0, 1)}
        assert sum(part.targets for part in parts) == one.targets == 5
        assert sorted(len(part.inputs[0]) for part in parts) == ([2, 3] if processes == 2 else [1, 2, 2])


def test_peek_does_not_advance(model, corpora):
    task = task_of(model, corpora[model])
    for _ in range(16):
        ahead = whole([task.peek()])
        assert torch.equal(ahead, whole([task.peek()])) and torch.equal(ahead, whole([task.next()]))


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_held_out_sequences_are_read_once_with_the_same_masks_always(model, processes, corpora):
    """Batches of 3, 3 and 1 sequences, so that some of five processes have none."""
    corpus, changes = corpora[model], {"batch_size": 5, "eval_batch_size": 3, "mask_rate": 0.5}
    alone = task_of(model, corpus, **changes)
    for split in ("valid", "test"):
        batches = list(alone.held_out(split))
        assert numbers(batches, getattr(corpus, split)) == list(range(HELD_OUT))
        assert [batch.shape for batch in batches] == [Shape(rows, T, 0, 4) for rows in (3, 3, 1)]
        alone.next()
        ranks = [task_of(model, corpus, Place(rank, processes), seed=9, **changes) for rank in range(processes)]
        rows = whole([batch for task in ranks for batch in task.held_out(split)])
        assert sorted(rows.tolist()) == sorted(whole(batches).tolist())
        for task in ranks:
            assert torch.equal(whole(list(task.held_out(split, everything=True))), whole(batches))
    assert alone.evaluation_shape == Shape(3, T, 0, 4)


@pytest.mark.parametrize("done", [0, 1, 15, 37])
def test_saved_state_resumes_exactly_on_any_number_of_processes(model, done, corpora):
    corpus, task = corpora[model], task_of(model, corpora[model])
    for _ in range(done):
        task.next()
    state = json.loads(json.dumps(task.state_dict()))
    fresh = [task_of(model, corpus, Place(rank, 3)) for rank in range(3)]
    for other in fresh:
        other.next(), other.load_state_dict(state)
    for _ in range(20):
        assert torch.equal(whole([other.next() for other in fresh]), whole([task.next()]))


def one_sentence(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text


def test_the_state_of_another_text_is_refused(model, corpora, tmp_path):
    state = task_of(model, corpora[model]).state_dict()
    other = Corpus.open(tiny.write_pieces(tmp_path / "other", model, train=400))
    with pytest.raises(UserError) as caught:
        task_of(model, other).load_state_dict(state)
    assert f"the saved state belongs to other data than {other.path}" in one_sentence(caught)


# refusals


@pytest.mark.parametrize(
    ("sizes", "changes", "said"),
    [
        ({"train": 31}, {}, "train of .* has 31 pieces, 3 sequences of --tgt_len 10, and 4 are needed"),
        ({"held_out": 7}, {}, "valid of .* has 7 pieces, 0 sequences of --tgt_len 10, and 1 are needed"),
        ({}, {"tgt_len": 500}, "train of .* has 485 pieces, 0 sequences of --tgt_len 500, and 4 are needed"),
    ],
    ids=str,
)
def test_a_text_too_short_is_refused(sizes, changes, said, model, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        task_of(model, Corpus.open(tiny.write_pieces(tmp_path / "pieces", model, **sizes)), **changes)
    one_sentence(caught)


def test_fewer_rows_than_processes_are_refused(model, corpora):
    with pytest.raises(UserError, match="--batch_size 2 is less than the 3 processes"):
        task_of(model, corpora[model], Place(1, 3), batch_size=2)


GOOD = {**tiny.VOCABULARY, **tiny.SPECIAL["bert"]}
LACKING = {name: value for name, value in GOOD.items() if name != "mask"}
WRONG = {
    **{"nothing": None, "a list": [1], "no mask": LACKING, "one too many": GOOD | {"unk": 1}, "behind the end": GOOD | {"mask": 40}},
    **{"negative": GOOD | {"pad": -1}, "a word": GOOD | {"cls": "2"}, "true": GOOD | {"cls": True}, "too large": GOOD | {"size": 65_537}},
}


@pytest.mark.parametrize("entry", WRONG.values(), ids=WRONG)
def test_a_bad_vocabulary_is_refused(entry, tmp_path):
    folder = tiny.write_pieces(tmp_path / "pieces")
    assert Corpus.open(folder).vocabulary == Vocabulary(**GOOD)
    tiny.change_meta(folder, vocabulary=entry)
    with pytest.raises(UserError, match=r"meta\.json is damaged: the field 'vocabulary.*' .*prepare") as caught:
        Corpus.open(folder)
    assert "prepare" in one_sentence(caught)


def test_half_a_piece_is_refused(tmp_path):
    folder = tiny.write_pieces(tmp_path / "pieces")
    splits = tiny.read_json(folder / "meta.json")["splits"]
    (folder / "valid.bin").write_bytes(b"abc")
    tiny.change_meta(folder, splits=splits | {"valid": splits["valid"] | {"bytes": 3}})
    with pytest.raises(UserError, match=r"valid\.bin has 3 bytes.*prepare_pieces\.py") as caught:
        Corpus.open(folder)
    one_sentence(caught)


MEANINGLESS = {
    **{"mem_len": 600, "eval_tgt_len": 8, "d_head": 8, "clamp_len": 3, "pre_lnorm": True, "same_length": True, "not_tied": True},
    **{"attn_moe": True},
}
MISTAKES = {
    **{(name, value): f"--{name} has no effect with --model MODEL: leave it out" for name, value in MEANINGLESS.items()},
    ("d_model", 18): "--d_model 18 is not divisible by --n_head 4",
    ("tgt_len", 2): "--tgt_len 2 must be at least 3, for [CLS], a piece and [SEP]",
    ("mask_rate", 0): "--mask_rate 0.0 must be above 0 and below 1",
    ("mask_rate", 1): "--mask_rate 1.0 must be above 0 and below 1",
}


def said_of(argv: list[str], capsys) -> str:
    """The one-line error of a command line, which exits with code 2."""
    with pytest.raises(SystemExit) as stop, exit_on_user_error():
        parse(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(("mistake", "said"), MISTAKES.items(), ids=[f"{name}-{value}" for name, value in MISTAKES])
def test_meaningless_flags_are_refused(mistake, said, model, capsys):
    name, value = mistake
    extra = {"method": "smoe_dropout"} if name == "attn_moe" else {}
    line = said_of(command(model, n_head=4, **extra, **{name: value}), capsys)
    assert said.replace("MODEL", model) in line
    assert ";" not in line.removesuffix(" (nothing was started; --help lists all flags)\n"), "one mistake, one sentence"
    parse(command(model, n_head=4, **extra))


def test_mask_rate_has_no_effect_with_transformer_xl_and_unknown_models_are_refused(capsys):
    folder = Path("unused")
    assert "--mask_rate has no effect with --model transformer_xl" in said_of(tiny.flags(folder, folder, mask_rate=0.3), capsys)
    assert "--model: unknown value 'bart'; nearest: bert" in said_of(command("bart"), capsys)


# models


def built(model: str, sparse: dict | None = None, **changes):
    """The model with weights large enough that every path affects the loss."""
    flags = parse(command(model, **{"n_layer": 3, "dropout": 0.0, "init_std": 0.3, **changes}))
    torch.manual_seed(0)
    made = architecture(model).build(flags, Vocabulary(**tiny.VOCABULARY, **tiny.SPECIAL[model])).eval()
    made.host.set_attn_implementation("eager")  # the operations of no other are counted
    return made if sparse is None else sd.moefy(made, sd.SMoEConfig(4, 2, backend="reference", **sparse))


@pytest.mark.parametrize("sparse", [None, {}], ids=["dense", "experts"])
def test_losses_logits_and_gradients_are_those_of_transformers(sparse, model, corpora):
    tokens, places, targets = task_of(model, corpora[model], mask_rate=0.4).next().inputs
    made = built(model, sparse)
    losses, state, logits = made(tokens, places, targets, None)
    assert state is None and losses.shape == (4, 3) and logits.shape == (4, 3, 40) and logits.dtype == torch.float32
    labels = torch.full_like(tokens, -100).scatter(1, places, targets)
    theirs = made.host(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels)
    assert losses.mean().item() == pytest.approx(theirs.loss.item(), rel=1e-6) and losses.std() > 0.1
    assert torch.allclose(logits, theirs.logits.gather(1, places[..., None].expand(-1, -1, 40)), rtol=1e-5, atol=1e-5)
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    ours, wanted = (torch.autograd.grad(loss, trained) for loss in (losses.mean(), theirs.loss))
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(ours, wanted, strict=True))


def positions_of(made, tokens: torch.Tensor) -> torch.Tensor:
    """The ids that the model looked its position embeddings up with."""
    seen = []
    embedding = made.host.base_model.embeddings.position_embeddings
    handle = embedding.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    made(tokens, torch.ones(len(tokens), 1, dtype=torch.int64), torch.ones(len(tokens), 1, dtype=torch.int64))
    handle.remove()
    return seen[0].expand_as(tokens)


@pytest.mark.parametrize("length", [10, 600])
def test_positions_are_counted_from_0_by_bert_and_from_behind_the_pad_by_roberta(length, model):
    made, first = built(model, tgt_len=length, n_layer=1), 0 if model == "bert" else 2
    tokens = torch.randint(5, 39, (2, length), generator=torch.Generator().manual_seed(0))
    assert torch.equal(positions_of(made, tokens), torch.arange(first, first + length).expand(2, -1))
    assert made.host.config.max_position_embeddings == max(512, length) + first


def test_a_random_piece_moves_no_position(corpora):
    task, made = task_of("roberta", corpora["roberta"], mask_rate=0.5), built("roberta", n_layer=1)
    tokens = torch.cat([task.next().inputs[0] for _ in range(150)])
    assert torch.equal(positions_of(made, tokens), torch.arange(2, 12).expand(len(tokens), -1))


def test_flags_decide_the_sizes(model):
    made = built(model, d_model=24, n_head=3, d_ff=20, n_layer=4, dropout=0.1, dropatt=0.2)
    c, names = made.host.config, ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "vocab_size")
    assert [getattr(c, name) for name in names] == [24, 3, 20, 4, 40]
    assert (c.hidden_dropout_prob, c.attention_probs_dropout_prob) == (0.1, 0.2)
    assert c.pad_token_id == tiny.SPECIAL[model]["pad"] and len(architecture(model).blocks(made)) == 4
    assert made.host.get_input_embeddings().weight is made.host.get_output_embeddings().weight
    assert made.host.get_input_embeddings().weight.std().item() == pytest.approx(0.3, rel=0.1)


def test_a_router_of_token_ids_sees_them(model, corpora):
    flags, vocabulary = parse(command(model, moe=True, gate_name="hash")), corpora[model].vocabulary
    made = build_model(flags, vocabulary).eval()
    tokens, places, targets = task_of(model, corpora[model]).next().inputs
    made(tokens, places, targets)
    chosen = {}
    for token, experts in zip(tokens.flatten().tolist(), moe_layers(made)[0][1].assigned.tolist(), strict=True):
        assert chosen.setdefault(token, experts) == experts
    assert len(set(map(tuple, chosen.values()))) > 1


# operations and parameters

V, D, F, L, E = 40, 16, 32, 3, 4
SPARSE = {"dense": None, "all_layers": {}, "one_layer": {"layers": (1,)}, "wide_experts": {"d_expert": 10}}


@pytest.mark.parametrize("shape", [Shape(1, 3, targets=1), Shape(3, 10, targets=4), Shape(2, 7, targets=7)], ids=str)
@pytest.mark.parametrize("sparse", SPARSE.values(), ids=SPARSE)
def test_forward_flops_at_each_k(sparse, shape, model):
    made, formula = built(model, sparse), architecture(model).forward_flops
    rows, positions, _, targets, _ = shape
    tokens = torch.full((rows, positions), 7)
    places = torch.arange(targets).expand(rows, -1)
    found = {k: formula(made, shape, k) for k in ((None,) if sparse is None else (1, 2, 4))}
    for k, flops in found.items():
        if k is not None:
            sd.set_top_k(made, k)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            made(tokens, places, places)
        assert flops == formula(made, shape, None) == counter.get_total_flops(), k
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("sparse", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_active_parameters_by_hand(k, sparse, model):
    embeddings = V * D + (512 + 2) * D + (2 * D if model == "bert" else 1 * D) + 2 * D
    embeddings -= 2 * D if model == "bert" else 0  # its positions begin at 0
    attention, norms, head = 4 * (D * D + D), 2 * 2 * D, D * D + D + 2 * D + V
    experts = 0 if sparse is None else len(sparse.get("layers", range(L)))
    width = (sparse or {}).get("d_expert", F // E)
    ffn = (L - experts) * (2 * D * F + F + D) + experts * (E * D + E + k * (2 * D * width + width + D))
    made = built(model, sparse)
    assert active_parameters(made, k) == (embeddings + L * (attention + norms) + head + ffn, ffn)
    counts = parameter_counts(made)
    assert counts["router"] == counts["total"] - counts["trainable"] == experts * (E * D + E)
    assert counts["total"] == active_parameters(made, 4)[0]
