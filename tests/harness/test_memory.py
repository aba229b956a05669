"""Sizes that no memory holds are refused by lower bounds on what a model takes."""

import pytest

from smoe_dropout.registry import METHODS
from tests import tiny
from tests.tiny import parse
from utils.cli.train import refuse_sizes
from utils.data.corpus import Corpus
from utils.data.tokenizer import Vocabulary
from utils.errors import UserError
from utils.flags import memory
from utils.models.build import build_model

LAYOUTS = ["", "--moe_index 1", "--moe_index 1 --dense_width all", "--d_inner 16 --moe_experts_by_layer 4,2"]


@pytest.mark.parametrize(
    "words",
    [
        *(f"--method {method}" for method in METHODS),
        *(f"--method smoe_dropout {layout}" for layout in LAYOUTS),
        *(f"--model {model} --method {method}" for model in ("bert", "roberta") for method in ("dense", "smoe_dropout --moe_index 0")),
    ],
)
def test_the_bound_is_below_the_parameters_and_close(words):
    sizes = "--preset quick --d_model 64 --d_ff 512 --moe_num_expert 4 --n_head 4"
    flags = parse([*sizes.split(), *words.split()])
    model = build_model(flags, None if flags.model == "transformer_xl" else Vocabulary(**tiny.VOCABULARY, **tiny.SPECIAL[flags.model]))
    actual = sum(parameter.numel() for parameter in model.parameters())
    assert 0.75 * actual < memory.least_parameters(flags) <= actual


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ("--d_model 10000000", "parameters take at least"),
        ("--d_ff 1000000000000000", "parameters take at least"),
        ("--moe_num_expert 1000000000 --d_inner 1", "parameters take at least"),
        ("--mem_len 1000000000000", "--mem_len 1000000000000 and --tgt_len 64 take at least"),
        ("--n_head 100000 --d_head 1 --tgt_len 2000 --batch_size 9", "--batch_size 9 in 1 parts take at least"),
        ("--batch_size 1000000", "too short for --batch_size 1000000"),
        ("--eval_batch_size 1000000", "too short for --eval_batch_size 1000000"),
    ],
)
def test_what_cannot_fit_is_refused_before_torch(sizes, said, tmp_path):
    data = tiny.write_corpus(tmp_path / "words")
    with pytest.raises(UserError, match=said):
        refuse_sizes(parse(f"--preset quick --method smoe --device cpu --data {data} {sizes}".split()), Corpus.open(data))


def test_the_limit_is_the_memory_of_the_machine(monkeypatch):
    flags = parse(["--preset", "quick", "--method", "dense", "--device", "cpu"])
    weights = 4 * memory.least_parameters(flags)
    least = 3 * weights + max(weights, memory._evaluation_positions(flags), memory.least_activations(flags, 10**6))
    monkeypatch.setattr(memory, "machine_memory", lambda: least)
    memory.refuse_if_too_large(flags, 10**6)
    monkeypatch.setattr(memory, "machine_memory", lambda: least - 1)
    with pytest.raises(UserError, match="and this machine has"):
        memory.refuse_if_too_large(flags, 10**6)
