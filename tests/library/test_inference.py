"""Inference: slimmed copies, generate.py, and tune_cpu."""

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

import smoe_dropout as sd
from benchmarks.__main__ import main
from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout.registry import METHODS
from smoe_dropout.sampling import draw, write
from tests import tiny
from utils.models.flops import active_parameters

SIMILARITY = pytest.mark.skipif("similarity" not in METHODS, reason="similarity is not here")


def language_model(**settings) -> MemTransformerLM:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "d_model": 16, "d_head": 8, "d_inner": 32, "mem_len": 8, "init_std": 0.3}
    return MemTransformerLM(TransformerXLConfig(256, **{**sizes, **settings}))


def with_experts() -> MemTransformerLM:
    return sd.moefy(language_model(), sd.SMoEConfig(num_experts=4, top_k=4, init_std=0.3))


def test_slimmed_copy_equals_the_model_at_k():
    model, tokens = with_experts().train(), torch.randint(256, (2, 8))
    slimmed = {k: sd.slim(model, k) for k in (1, 2, 4)}
    assert sd.get_top_k(model) == 4 and model.training and all(parameter.grad is None for parameter in model.parameters())
    for k, copy in slimmed.items():
        assert sd.get_top_k(copy) == k and not copy.training and not any(p.requires_grad for p in copy.parameters())
        with sd.top_k(model.eval(), k), torch.no_grad():
            torch.testing.assert_close(copy.logits(tokens)[0], model.logits(tokens)[0])
    active = [active_parameters(copy, sd.get_top_k(copy))[0] for copy in slimmed.values()]
    assert active == sorted(set(active))
    with pytest.raises(ValueError, match="from 1 to the 4 experts"):
        sd.slim(model, 5)


@pytest.mark.parametrize("settings", [{"router": "learned", "method": "similarity"}, {"router": "hash"}])
def test_slimmed_copy_in_bf16_of_other_kinds_of_routing(settings):
    model = sd.moefy(language_model(), sd.SMoEConfig(4, 2, init_std=0.3, **settings)).eval()
    copy, tokens = sd.slim(model, 2, torch.bfloat16), torch.randint(256, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(copy.logits(tokens)[0], model.logits(tokens)[0], atol=0.3, rtol=0.1)


def test_slimmed_copy_in_bf16_routes_like_the_model():
    model, tokens = with_experts().eval(), torch.randint(256, (2, 8))
    copy = sd.slim(model, 2, torch.bfloat16)
    for name, parameter in copy.named_parameters():
        assert parameter.dtype == (torch.float32 if "router" in name else torch.bfloat16), name
    with sd.top_k(model, 2), torch.no_grad():
        torch.testing.assert_close(copy.logits(tokens)[0], model.logits(tokens)[0], atol=0.3, rtol=0.1)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_cached_generation_matches_reading_the_whole_text(temperature):
    """The prompt is read in segments and bytes are cached one by one; the reference rereads all bytes in memory before every draw."""
    model, prompt = language_model(mem_len=64).eval(), b"the prompt"
    torch.manual_seed(1)
    written = list(write(model, prompt, 20, temperature, 1.0, segment=3))
    torch.manual_seed(1)
    text = list(prompt)
    for _ in written:
        text.append(int(draw(model.read(torch.tensor([text]))[0][0, -1], temperature, 1.0)))
    assert bytes(text) == prompt + bytes(written)


def test_top_p_draws_only_from_the_smallest_sufficient_set():
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    torch.manual_seed(0)
    drawn = [int(draw(logits, 1.0, 0.7)) for _ in range(600)]
    assert set(drawn) == {1, 3} and abs(drawn.count(1) / 600 - 2 / 3) < 0.06
    assert {int(draw(logits, 1.0, 1e-6)) for _ in range(20)} == {int(draw(logits, 0, 1.0))} == {1}
    assert len({int(draw(logits, 1.0, 1.0)) for _ in range(600)}) == 4
    cold = [int(draw(logits, 0.2, 1.0)) for _ in range(100)]
    assert cold.count(1) > 90


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    corpus = tiny.write_corpus(root / "corpus")
    for method in ("smoe_dropout", "dense"):
        tiny.completed(tiny.flags(corpus, root / method, method=method, max_step=4, eval_interval=4))
    if "similarity" in METHODS:
        sizes = {"max_step": 2, "eval_interval": 2, "eval_tgt_len": 4, "moe_top_k": 1}
        done = tiny.run(tiny.flags(corpus, root / "similarity", method="similarity", **sizes))
        assert done.code == 0, done
        (root / "similarity.err").write_text(done.err)
    return root


@SIMILARITY
def test_reservations_before_training(runs):
    """Each said once: also the library's warning of the router."""
    first, *_ = (runs / "similarity.err").read_text().splitlines()
    assert re.match(r"warning: the task does not train the router of .*, since at k = 1 .*\(k: constant, 1 to 1 over 2 steps\)", first)
    assert (runs / "similarity.err").read_text().count("does not train the router") == 1


def read_from(path: Path) -> None:
    os.dup2(os.open(path, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)


def generate(*arguments: object, prompt: Path | None = None) -> tiny.Finished:
    """Run generate.py, with a file as standard input if a prompt is given."""
    return tiny.run([*map(str, arguments), "--threads", "1"], prompt and partial(read_from, prompt), program="generate.py")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_generate(runs, precision, tmp_path):
    arguments = ("--checkpoint", runs / "smoe_dropout", "--length", 12, "--k", 2, "--precision", precision)
    done = generate(*arguments, "--prompt", "Words and ")
    assert done.code == 0 and done.out_bytes.startswith(b"Words and ") and len(done.out_bytes) == 22, done
    assert "12 bytes in" in done.err and "k = 2 of 4" in done.err
    (tmp_path / "prompt").write_bytes(b"Words and ")
    assert generate(*arguments, prompt=tmp_path / "prompt").out_bytes == done.out_bytes


@SIMILARITY
def test_generate_by_a_method_that_routes_by_earlier_bytes(runs):
    done = generate("--checkpoint", runs / "similarity", "--length", 12, "--k", 2, "--prompt", "Words and ")
    assert done.code == 0 and len(done.out_bytes) == 22, done


def test_generate_by_drafts(runs):
    arguments = ("--checkpoint", runs / "smoe_dropout", "--length", 40, "--temperature", 0, "--prompt", "Words and ")
    drafted = generate(*arguments, "--draft_k", 1, "--draft_length", 3)
    assert drafted.code == 0 and drafted.out_bytes == generate(*arguments).out_bytes, drafted
    assert re.search(r"k = 4 of 4, \d+ of \d+ bytes drafted at k = 1 accepted", drafted.err)


@pytest.mark.parametrize(
    ("run", "arguments", "sentence"),
    [
        ("dense", ["--k", "2"], "is dense; leave it out"),
        ("dense", ["--precision", "int8"], "is dense, and only experts are stored in int8; use bf16"),
        ("smoe_dropout", ["--k", "5"], "--k 5 must be from 1 to the 4 experts"),
        (
            "smoe_dropout",
            ["--top_p", "0", "--length", "0", "--temperature=-1"],
            "--length 0 must be at least 1; --temperature -1.0 must",
        ),
        ("smoe_dropout", ["--precision", "fp8"], "--precision: unknown value 'fp8'; nearest: fp32"),
        ("nothing", [], "does not exist"),
        pytest.param("similarity", ["--draft_k", "1"], "--method similarity chooses experts by the bytes that are read", marks=SIMILARITY),
    ],
)
def test_generate_rejects_invalid_arguments(runs, run, arguments, sentence):
    done = generate("--checkpoint", runs / run, *arguments)
    assert done.code == 2 and sentence in done.err and done.out == "" and done.err.count("\n") == 1, done


def test_benchmark_of_drafts(runs, tmp_path, capsys):
    sizes = ["--prompts", "2", "--prompt", "8", "--tokens", "5", "--rounds", "1", "--k", "4", "--draft_k", "1", "4", "--draft_length", "2"]
    main(["speculation", "--checkpoints", str(runs / "smoe_dropout"), "--data", str(runs / "corpus"), *sizes, "--out", str(tmp_path)])
    (row,) = json.loads((tmp_path / "speculation.json").read_text())["rows"]
    assert (row["k"], row["draft_k"], row["draft_length"]) == (4, 1, 2) and 0 <= row["accepted"] <= row["drafted"]
    assert "| smoe_dropout | 4 | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(("k", "draft_k", "assistant_k"), [(4, 2, None), (3, 1, 2)])
def test_a_slimmed_model_assists_in_generation(k, draft_k, assistant_k):
    """The same text, in float64; the assistant's k is its own: that of `slim`, or of a context of its own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, initializer_range=0.7, tie_word_embeddings=False)
    model = sd.moefy(transformers.LlamaForCausalLM(config), sd.SMoEConfig(4, 4, init_std=0.5)).eval().double()
    assistant, tokens = sd.slim(model, draft_k), torch.randint(60, (1, 5))
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}
    with sd.top_k(model, k), sd.top_k(assistant, assistant_k) if assistant_k else nullcontext():
        plain = model.generate(tokens, **settings)
        assisted = model.generate(tokens, **settings, assistant_model=assistant)
    assert torch.equal(plain, assisted) and len(plain.unique()) > 9
    used = [sd.moe_layers(one)[0][1].assigned.shape[1] for one in (model, assistant)]
    assert used == [k, assistant_k or draft_k]


def test_tuning_keeps_precision():
    """In a separate process, since the settings are permanent."""
    code = """
import torch, smoe_dropout
draw = torch.Generator().manual_seed(1)
a, b = torch.randn(2, 300, 300, generator=draw)
settings = smoe_dropout.tune_cpu()
assert len(settings) == 2 and all(settings), settings
error = (a @ b - (a.double() @ b.double())).abs().max()
assert error < 1e-4, (error, settings)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tiny.ROOT)
    assert done.returncode == 0, done.stderr


def test_settings_that_lose_precision_are_reverted(monkeypatch):
    from smoe_dropout import tuning

    errors, before = iter([1e-6, 1e-2]), torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(tuning, "_error", lambda: next(errors))
    assert "torch's default: oneDNN would lose precision" in tuning._onednn_products()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
