"""Padding does not count in balance losses and expert load, and a layer that is used several times counts all its uses."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import smoe_dropout as sd
from smoe_dropout.registry import ROUTERS, load
from smoe_dropout.routers import LinearRouter, switch_balance_loss

D, E = 8, 4
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]]).bool()
KINDS = {name: load(ROUTERS, "router", name) for name in ROUTERS}
LINEAR = [name for name, kind in KINDS.items() if issubclass(kind, LinearRouter) and "balance_loss" in kind.uses and not kind.needs]


def ffn() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D))


def converted(model: nn.Module, **settings) -> nn.Module:
    return sd.moefy(
        model, sd.SMoEConfig(**{"num_experts": E, "top_k": 2, "router": "learned", "balance_loss": 0.7, "init_std": 0.5, **settings})
    )


def only(model: nn.Module) -> sd.MoELayer:
    [(_, layer)] = sd.moe_layers(model)
    return layer


# padding


@pytest.mark.parametrize(("router", "method"), [*((name, None) for name in LINEAR), ("learned", "competesmoe")])
def test_losses_and_load_are_those_of_the_real_tokens(router, method):
    """Bit for bit the same if all tokens are real, and outputs are the same in any case."""
    torch.manual_seed(0)
    made = converted(nn.Sequential(ffn()), router=router, method=method, options={"flip_rate": 1.0} if method else {}).train()
    x = torch.randn(2, 7, D)
    results = []
    for mask in (None, torch.ones(2, 7), REAL):
        torch.manual_seed(1)
        model = copy.deepcopy(made)  # a pass may change what the router keeps
        with sd.token_mask(model, torch.zeros(3, 3) if mask is None else mask):  # a mask of another shape is ignored
            y = model(x)
        if (auxiliary := sd.auxiliary_loss(model)).requires_grad:
            auxiliary.backward()
        results.append((y.detach(), auxiliary.detach(), only(model).router.weight.grad, only(model).load()))
    for other in results[1:]:
        assert torch.equal(other[0], results[0][0])
    for one, other in zip(results[0], results[1], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assigned = only(model).assigned
    chosen = assigned[REAL.flatten()]
    assert torch.equal(results[2][3], torch.bincount(chosen[chosen >= 0], minlength=E) / (chosen >= 0).sum())
    if router in ("random", "learned", "logit_drop") and not method:
        torch.manual_seed(1)
        logits = nn.functional.dropout(only(model).router.logits(x.flatten(0, 1)), 0.5 if router == "logit_drop" else 0.0)[REAL.flatten()]
        torch.testing.assert_close(results[2][1], 0.7 * switch_balance_loss(logits, assigned[REAL.flatten()]).detach())
    else:
        assert results[2][1] != results[0][1]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("additive", [True, False])
def test_masks_of_torchs_layers(batch_first, additive):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 32, 0.0, batch_first=batch_first)
    model = converted(nn.TransformerEncoder(layer, 2)).train()
    x, hidden = torch.randn(2, 7, D), ~REAL
    if additive:
        hidden = torch.zeros(2, 7).masked_fill(hidden, -torch.inf)
    model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=hidden)
    for _, layer in sd.moe_layers(model):
        assert torch.equal(layer.uses[0].real_N, (REAL if batch_first else REAL.t()).reshape(-1))
    model(x[:, :6] if batch_first else x.transpose(0, 1)[:6])
    assert all(layer.uses[0].real_N is None for _, layer in sd.moe_layers(model))


def test_mask_does_not_outlive_a_failed_pass():
    model = converted(nn.TransformerEncoderLayer(D, 2, 32, 0.0, batch_first=True))
    x = torch.randn(2, 7, D)
    hook = model.norm2.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x, src_key_padding_mask=~REAL)
    hook.remove()
    only(model)(x)
    assert only(model).uses[0].real_N is None and len(only(model).uses) == 1


# several uses


class Shared(nn.Module):
    """One network, applied several times, as in ALBERT; or to parts of the tokens."""

    def __init__(self, depth: int = 1, chunk: int | None = None, checkpointed: bool | None = None):
        super().__init__()
        self.inner, self.depth, self.chunk, self.checkpointed = nn.Sequential(nn.LayerNorm(D), ffn()), depth, chunk, checkpointed

    def forward(self, x):
        for _ in range(self.depth):
            x = x + torch.cat([self.called(part) for part in x.split(self.chunk or len(x))])
        return x

    def called(self, x):
        return self.inner(x) if self.checkpointed is None else checkpoint(self.inner, x, use_reentrant=self.checkpointed)


def shared(**settings) -> nn.Module:
    torch.manual_seed(0)
    return converted(Shared(**settings)).train()


def test_shared_layer_counts_all_uses():
    model, x = shared(depth=3), torch.randn(5, D)
    for _ in range(2):  # uses of the last pass only
        model(x)
        layer = only(model)
        assert len(layer.uses) == 3 and layer.assigned.shape == (15, 2)
        torch.testing.assert_close(layer.losses["balance"], sum(use.losses["balance"] for use in layer.uses) / 3)
        torch.testing.assert_close(layer.load(), torch.bincount(layer.assigned.flatten(), minlength=E) / 30)
    assert len({use.losses["balance"].item() for use in layer.uses}) == 3
    model.inner(x)  # outside a pass of the model a use stands alone
    model.inner(x)
    assert len(layer.uses) == 1


def test_chunks_have_the_load_of_the_whole_and_the_mean_loss():
    """Weighted by their tokens; a mask of the whole does not fit the chunks."""
    whole, parts, x = shared(), shared(chunk=3), torch.randn(7, D)
    torch.testing.assert_close(whole(x), parts(x))
    assert torch.equal(only(whole).assigned, only(parts).assigned) and torch.equal(only(whole).load(), only(parts).load())
    losses = [use.losses["balance"] for use in only(parts).uses]
    assert len(losses) == 3
    torch.testing.assert_close(only(parts).losses["balance"], (3 * losses[0] + 3 * losses[1] + losses[2]) / 7)


@pytest.mark.parametrize("settings", [{"depth": 3}, {"chunk": 3}])
def test_checkpointed_layer_used_several_times(settings):
    found, x = [], torch.randn(7, D, requires_grad=True)
    for checkpointed in (None, False):
        model = shared(**settings, checkpointed=checkpointed)
        (model(x).square().sum() + sd.auxiliary_loss(model)).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert len(only(model).uses) == 3  # recomputation leaves them alone
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)
    model = shared(**settings, checkpointed=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        (model(x).square().sum() + sd.auxiliary_loss(model)).backward()


def test_checkpointed_pass_is_repeated_at_its_own_k():
    x, gradients = torch.randn(7, D), []
    for checkpointed in (None, False):
        model = shared(depth=3, checkpointed=checkpointed)
        own = x.clone().requires_grad_()
        with sd.top_k(model, 3):
            loss = model(own).sum()
        sd.set_top_k(model, 1)
        loss.backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)


def test_checkpointed_passes_that_cannot_be_told_apart_are_refused():
    model, x, losses = shared(checkpointed=False), torch.randn(7, D, requires_grad=True), []
    for k in (1, 3):
        with sd.top_k(model, k):
            losses.append(model(x).sum())
    with pytest.raises(RuntimeError, match="at k = 1, 3, wait for their backward pass"):
        sum(losses).backward()


def test_copies_and_pickles_of_a_used_model():
    model = shared(depth=2)
    model(torch.randn(5, D))
    twin = copy.deepcopy(model)
    twin(torch.randn(3, D))
    assert only(twin).assigned.shape == (6, 2) and only(model).assigned.shape == (10, 2) and only(copy.deepcopy(model)).assigned is None


# transformers

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TOKENS = torch.randint(3, 31, (2, 7), generator=torch.Generator().manual_seed(1))


def language_model(**settings) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, max_position_embeddings=20))
    return converted(model, **settings).train()


def reals(model: nn.Module) -> list[torch.Tensor | None]:
    return [layer.uses[-1].real_N for _, layer in sd.moe_layers(model)]


def test_language_model_with_padding_equals_the_rows_without():
    model = language_model()
    loss = model(TOKENS, attention_mask=REAL.long(), labels=TOKENS.masked_fill(~REAL, -100)).loss
    expert_load = sd.expert_load(model)
    assert all(torch.equal(real, REAL.flatten()) for real in reals(model))
    layers = [layer for _, layer in sd.moe_layers(model)]
    padded = [layer.assigned[REAL.flatten()] for layer in layers]
    single = []
    for row, real in zip(TOKENS, REAL, strict=True):
        model(row[real][None])
        single.append([layer.assigned for layer in layers])
    for layer, (name, found) in enumerate(expert_load.items()):
        assert torch.equal(padded[layer], torch.cat([rows[layer] for rows in single])), name
        assert torch.equal(found, torch.bincount(padded[layer].flatten(), minlength=E) / padded[layer].numel())
    assert loss.isfinite()


@pytest.mark.parametrize("how", ["keyword", "position", "checkpointed", "outer"])
def test_mask_arrives_however_the_model_runs(how):
    model = language_model()
    model(TOKENS, attention_mask=REAL.long(), labels=TOKENS).loss.backward()
    expected = [layer.router.weight.grad.clone() for _, layer in sd.moe_layers(model)]
    model.zero_grad()
    if how == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "outer":
        with sd.token_mask(nn.Sequential(model), REAL):
            model(TOKENS, attention_mask=torch.ones_like(TOKENS), labels=TOKENS)
        assert all(torch.equal(real, REAL.flatten()) for real in reals(model))
        return
    output = model(TOKENS, REAL.long(), labels=TOKENS) if how == "position" else model(TOKENS, attention_mask=REAL.long(), labels=TOKENS)
    output.loss.backward()
    for (_, layer), gradient in zip(sd.moe_layers(model), expected, strict=True):
        torch.testing.assert_close(layer.router.weight.grad, gradient)


def test_generation_with_padding():
    """The prompt's padding is masked; later passes have one new token per row."""
    model, seen = language_model().eval(), []
    only_layer = sd.moe_layers(model)[0][1]
    only_layer.register_forward_hook(lambda *_: seen.append(only_layer.uses[-1].real_N))
    left = REAL.flip(1)
    model.generate(TOKENS, attention_mask=left.long(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(seen[0], left.flatten()) and seen[1:] == [None, None]


def test_encoder_and_decoder_have_their_own_masks():
    """Although both have the same shape."""
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0, pad_token_id=0)
    config.decoder_start_token_id = 0
    model = converted(transformers.T5ForConditionalGeneration(config), sites="*.DenseReluDense").train()
    other = REAL.flip(0)
    model(input_ids=TOKENS, attention_mask=REAL.long(), decoder_attention_mask=other.long(), labels=TOKENS)
    for (name, _), real in zip(sd.moe_layers(model), reals(model), strict=True):
        assert torch.equal(real, (other if name.startswith("decoder") else REAL).flatten()), name
    model(input_ids=TOKENS, attention_mask=REAL.long(), labels=TOKENS)
    for (name, _), real in zip(sd.moe_layers(model), reals(model), strict=True):
        assert real is None if name.startswith("decoder") else torch.equal(real, REAL.flatten()), name


def test_encoder_inside_another_model():
    model = converted(nn.Sequential(transformers.BertModel(transformers.BertConfig(**SIZES, max_position_embeddings=20))))
    model[0](TOKENS, attention_mask=REAL.long())
    assert all(torch.equal(real, REAL.flatten()) for real in reals(model))
