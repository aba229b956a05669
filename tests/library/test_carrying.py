"""Routing by earlier positions is the same with and without a cache, in whatever pieces a text is read, or refused."""

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
import transformers
from torch import nn

import smoe_dropout as sd
from tests import tiny
from tests.library.test_moefy import transformer_xl
from utils.models.build import build_model

SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
HOSTS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=3, n_head=2, n_positions=64)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)),
    "sliding": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)),
}
METHODS = ("similarity", "attention")


def made(host: str, method: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = HOSTS[host]()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    config = {"router": "learned", "gate_weight": "sigmoid", "init_std": 0.5, "layers": (0, 2), "method": method}
    return sd.moefy(model, sd.SMoEConfig(4, 1, **{**config, **settings})).eval()


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 31, (rows, length), generator=torch.Generator().manual_seed(1))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", HOSTS)
def test_pieces_cuts_and_copies_of_a_cache_equal_the_whole_text(host, method):
    model, text = made(host, method), ids()
    with torch.no_grad():
        whole = model(text, use_cache=False).logits
        assert (model(text[:, 5:6], use_cache=False).logits - whole[:, 5:6]).abs().max() > 1e-2  # the past matters
        for configured in (True, False):
            cache, end = transformers.DynamicCache(**({"config": model.config} if configured else {})), 0
            for length in (3, 1, 1, 2):
                close(model(text[:, end : end + length], past_key_values=cache).logits, whole[:, end : end + length])
                end += length
            copied = copy.deepcopy(cache)
            if host != "sliding":  # whose past is gone
                model(ids(2, 2), past_key_values=cache)
                cache.crop(-2)
            cache.reorder_cache(torch.tensor([1, 0]))
            close(model(text[[1, 0], end:], past_key_values=cache).logits, whole[[1, 0], end:])
            copied.batch_repeat_interleave(2)
            close(model(text[[0, 0, 1, 1], end:], past_key_values=copied).logits, whole[[0, 0, 1, 1], end:])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}, {"padded": True}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_generation(method, settings):
    model, text = made("gpt2", method), ids(2, 6)
    mask = torch.ones_like(text)
    if settings == {"padded": True}:
        settings, mask[0, :2] = {}, 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
    found = [model.generate(text, use_cache=cached, **settings) for cached in (True, False)]
    assert torch.equal(*found)


def meet_at_layers(model: nn.Module) -> None:
    """Make two threads that run the model wait for each other before every MoE layer, when both have run the attention before it."""
    barrier = Barrier(2, timeout=20)

    def meet(*_) -> None:
        barrier.wait()

    for _, layer in sd.moe_layers(model):
        layer.register_forward_pre_hook(meet)


@pytest.mark.parametrize("method", METHODS)
def test_two_threads_do_not_see_each_other(method):
    model, texts = made("gpt2", method), [ids(1, 12), ids(1, 12).flip(1)]

    @torch.no_grad()
    def read(text: torch.Tensor) -> torch.Tensor:
        cache = transformers.DynamicCache()
        return torch.cat([model(piece, past_key_values=cache).logits for piece in text.split(3, 1)], 1)

    with torch.no_grad():
        expected = [model(text, use_cache=False).logits for text in texts]
    meet_at_layers(model)
    with ThreadPoolExecutor(2) as pool:
        for one, other in zip(pool.map(read, texts), expected, strict=True):
            close(one, other)


def dense_cache(model: nn.Module) -> transformers.DynamicCache:
    """A cache of positions that the model read before its conversion."""
    return HOSTS["gpt2"]()(ids(), use_cache=True).past_key_values


REFUSED = {
    "static": (lambda m: transformers.StaticCache(m.config, max_cache_len=32), "StaticCache cannot carry .*: pass use_cache=False"),
    "of the dense model": (dense_cache, "holds 12 positions, 0 of them with .*: pass use_cache=False"),
}


@pytest.mark.parametrize(("cache", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_caches(cache, words):
    model = made("gpt2", "similarity")
    with pytest.raises(sd.ConfigError, match=words):
        model(ids(), past_key_values=cache(model))
    model(ids())


@pytest.mark.parametrize("method", METHODS)
def test_decoder_with_attention_to_an_encoder(method):
    """The layer after it would not know which tokens are later."""
    sizes = {"vocab_size": 31, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 8, "decoder_start_token_id": 0}

    def converted(**settings) -> nn.Module:
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
        model.set_attn_implementation("eager")
        return sd.moefy(model, sd.SMoEConfig(4, 2, router="learned", method=method, **settings)).eval()

    with pytest.raises(sd.ConfigError, match="T5Attention attends from a decoder to an encoder"):
        converted()(ids(), labels=ids())
    assert converted(layers=(0,)).generate(ids(), max_new_tokens=3).shape == (2, 4)
    model = transformers.BartForCausalLM(
        transformers.BartConfig(vocab_size=31, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32)
    )
    model.set_attn_implementation("eager")
    with pytest.raises((sd.ConfigError, RuntimeError), match=r"(did not run|has not run) before"):
        sd.moefy(model, sd.SMoEConfig(4, 2, router="learned", method=method))(ids())


@pytest.mark.parametrize("segment_len", [6, None])
@pytest.mark.parametrize("method", METHODS)
def test_a_transformer_xl_reads_segments_in_any_pieces(method, segment_len):
    """Routes of evaluation and of generation are those of training, whose segments have memory but no routing across them."""
    model, text = transformer_xl(mem_len=20, segment_len=segment_len), ids(2, 19) % 11
    sd.moefy(model, sd.SMoEConfig(4, 1, router="learned", gate_weight="sigmoid", init_std=0.5, method=method)).eval()
    segments, memory, cache, read = [], None, None, []
    with torch.no_grad():
        for segment in text.split(segment_len or 19, 1):
            logits, memory = model.logits(segment, memory)
            segments.append(logits)
        whole = torch.cat(segments, 1)
        for place, piece in enumerate(text.split([3, 1, 1, 2, 1, 11], 1)):
            if place in (1, 4):  # what is forgotten leaves no trace
                for cached in model.read(text[:, -1:], cache)[1]:
                    cached.forget(1)
            logits, cache = model.read(piece, cache)
            read.append(logits)
        close(torch.cat(read, 1), whole)
        assert (model.read(text[:, 5:6])[0] - whole[:, 5:6]).abs().max() > 1e-2  # the earlier positions matter
        with pytest.raises(ValueError, match="cannot be forgotten"):
            cache[0].forget(2 if segment_len else 20)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_evaluates_short_pieces_as_it_trains(method):
    """Segments of --tgt_len, read --eval_tgt_len positions at a time, have the logits of training."""
    flags = tiny.parse(tiny.flags(Path("text"), Path("run"), method=method, tgt_len=8, eval_tgt_len=2, mem_len=20, init_std=0.5))
    model, text, memory, cache, wholes, read = build_model(flags).double().eval(), ids(2, 16), None, None, [], []
    with torch.no_grad():
        for segment in text.split(flags.tgt_len, 1):
            logits, memory = model.logits(segment, memory)
            wholes.append(logits)
        for piece in text.split(flags.eval_tgt_len, 1):
            logits, cache = model.read(piece, cache)
            read.append(logits)
    close(torch.cat(read, 1), torch.cat(wholes, 1))


def test_probabilities_of_a_transformer_xl_belong_to_a_thread():
    model, texts = transformer_xl(n_layer=2), [ids(1, length) % 11 for length in (6, 7)]
    sd.moefy(model.eval(), sd.SMoEConfig(4, 1, router="learned", gate_weight="sigmoid", init_std=0.5, method="attention"))
    expected = [model.logits(text)[0] for text in texts]
    assert copy.deepcopy(model).layers[0].attention.probabilities is None
    meet_at_layers(model)
    with ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(lambda text: model.logits(text)[0], texts), expected))
