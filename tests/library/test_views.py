"""`slim` gives views: models with a k, mode and state of their own that share the weights of another."""

import threading
import tracemalloc
from collections.abc import Callable

import pytest
import torch
from torch import nn

import smoe_dropout as sd
from smoe_dropout.slimming import tensors
from tests.library.test_hosts import TOKENS, logits, made
from tests.library.test_inference import language_model
from tests.library.test_moefy import hand_written, outputs

LEARNED = sd.SMoEConfig(4, 4, router="learned", expert_init="split")


def storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(model) if not tensor.is_meta and tensor.numel()}


def read(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(TOKENS)[0]


def gpt2() -> nn.Module:
    return sd.moefy(made("gpt2"), LEARNED).eval()


def mixtral() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return sd.adopt(transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=100, num_local_experts=4, **sizes)))


def xl(**settings) -> nn.Module:
    return sd.moefy(language_model(), sd.SMoEConfig(4, 4, init_std=0.3, **settings))


# a model, and what runs it
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor]]] = {
    "torch": (lambda: sd.moefy(hand_written(), sd.SMoEConfig(4, 4)), outputs),
    "gpt2": (gpt2, logits),
    "transformer_xl": (xl, read),
    "hash": (lambda: xl(router="hash"), read),
    "attention": (lambda: xl(router="learned", method="attention"), read),
    "compressed": (lambda: sd.compress(xl(), 2), read),
    "adopted": (mixtral, logits),
}


@pytest.mark.parametrize("kind", KINDS)
def test_view_equals_the_model_at_k_and_shares_all_tensors(kind):
    make, run = KINDS[kind]
    model = make().train()
    trained = [parameter.requires_grad for parameter in model.parameters()]
    before = sd.get_top_k(model)
    view = sd.slim(model, 1)
    assert storages(view) <= storages(model) and not view.training and not any(p.requires_grad for p in view.parameters())
    assert {part for part in view.modules() if part in set(model.modules())} == set()
    assert model.training and sd.get_top_k(model) == before and [p.requires_grad for p in model.parameters()] == trained
    model.eval()
    with sd.top_k(model, 1):
        expected = run(model)
    for _, layer in sd.moe_layers(model):
        layer.uses = []
    assert torch.equal(run(view), expected) and not any(layer.uses for _, layer in sd.moe_layers(model))


def test_view_follows_the_model_until_its_tensors_are_replaced(tmp_path):
    model = gpt2()
    view, copied = sd.slim(model, {"transformer.h.1.mlp.0": 2}), sd.slim(model, [4, 2, 4], copy=True)
    assert view.lm_head.weight is view.transformer.wte.weight and view.config is not model.config
    assert model.config.smoe_dropout["top_k_by_layer"] is None and view.config.smoe_dropout["top_k_by_layer"] == (4, 2, 4)
    assert not storages(copied) & storages(model)
    before = logits(view)
    assert torch.equal(logits(copied), before)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    with sd.top_k(model.eval(), [4, 2, 4]):
        assert torch.equal(logits(view), logits(model)) and not torch.equal(logits(view), before)
    model.load_state_dict(copied.state_dict())
    assert torch.equal(logits(view), before) and torch.equal(logits(copied), before)
    sd.save_pretrained(view, tmp_path)
    model.to(torch.bfloat16)
    assert torch.equal(logits(view), before) and torch.equal(logits(sd.from_pretrained(tmp_path)), before)


def test_view_is_an_assistant():
    model = gpt2()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(TOKENS[:1], **settings)
    assert torch.equal(model.generate(TOKENS[:1], assistant_model=sd.slim(model, 1), **settings), greedy)


def test_views_serve_in_threads_while_the_model_trains():
    """Each thread has a view; another trains the model with a learning rate of 0, which changes k, mode, gradients and losses."""
    model, ks = gpt2(), (1, 2, 3, 4) * 2
    expected = {}
    for k in set(ks):
        with sd.top_k(model, k):
            expected[k] = logits(model)
    views, wrong, rounds = [sd.slim(model, k) for k in ks], [], 5

    def serve(k: int, view: nn.Module) -> None:
        wrong.extend(k for _ in range(rounds) if not torch.equal(logits(view), expected[k]))

    def train() -> None:
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.0)
        for step in range(rounds):
            sd.set_top_k(model, 1 + step % 4)
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()

    threads = [threading.Thread(target=serve, args=pair) for pair in zip(ks, views, strict=True)] + [threading.Thread(target=train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(parameter.grad is not None for _, layer in sd.moe_layers(model) for parameter in layer.experts.parameters())


def test_memory_of_a_view():
    layer = nn.TransformerEncoderLayer(256, 4, 8192, batch_first=True)
    model = sd.moefy(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), sd.SMoEConfig(16, 4))
    size = sum(parameter.nbytes for parameter in model.parameters())
    tracemalloc.start()
    try:
        view = sd.slim(model, 2)
        held, _ = tracemalloc.get_traced_memory()  # of Python; that of tensors is what the storages show
    finally:
        tracemalloc.stop()
    assert storages(view) <= storages(model) and held < 0.01 * size


def test_views_of_a_compiled_model_share_graphs():
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _examples: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    model = torch.compile(sd.moefy(hand_written(), sd.SMoEConfig(4, 4)), backend=backend)
    ks = (1, 2, 1, 2)
    views = [sd.slim(model, k) for k in ks]
    assert storages(views[0]) <= storages(model)
    found = [outputs(view) for view in views]
    assert len(graphs) == 2
    for y, k in zip(found, ks, strict=True):
        with sd.top_k(model, k):
            torch.testing.assert_close(y, outputs(model))


class Quantised(nn.Parameter):
    pass


class FSDPModule(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: FSDPModule(model), "FSDPModule wraps the model and cannot be copied"),
        (lambda model: model.register_parameter("scale", Quantised(torch.ones(1))) or model, r"a Quantised, .* use slim\(..., copy=True\)"),
    ],
)
def test_what_cannot_be_a_view_is_refused(change, message):
    with pytest.raises(sd.ConfigError, match=message):
        sd.slim(change(gpt2()), 1)
    assert sd.slim(sd.moefy(hand_written(), sd.SMoEConfig(4, 4)), 1, copy=True).training is False
