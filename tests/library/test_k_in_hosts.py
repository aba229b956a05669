"""k of a block in what others run: transformers' generate, Trainer and checkpointing, DDP, adopted models, coroutines, many requests."""

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import smoe_dropout as sd
from tests import tiny
from tests.harness.test_parallel import as_rank, free_port
from tests.library.test_any_k import ROWS, TOKENS, B, E, T, net
from tests.library.test_hosts import SMALL, made
from tests.library.test_k_in_context import REQUESTS, selecting

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 31, (B, T), generator=torch.Generator().manual_seed(1))
GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def opt() -> nn.Module:
    """A model that flattens its tokens."""
    config = transformers.OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=20, word_embed_proj_dim=16)
    return transformers.OPTForCausalLM(config)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = transformers.T5Config(vocab_size=31, **sizes, decoder_start_token_id=0, dropout_rate=0.0)
    return transformers.T5ForConditionalGeneration(config)


def sparse(host: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = {"opt": opt, "t5": t5}.get(host, partial(made, host))().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return sd.moefy(model, sd.SMoEConfig(E, 2, **{"init_std": 0.3, **settings}))


def generated(model: nn.Module, k, ids: Tensor = IDS, **settings) -> Tensor:
    with sd.top_k(model, k):
        return model.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **settings})


SETTINGS = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "sampling": {"do_sample": True, "top_k": 1},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 2},
}
GENERATIONS = [("llama", name) for name in SETTINGS] + [("opt", "greedy"), ("opt", "beams"), ("t5", "greedy"), ("t5", "beams")]


@pytest.mark.parametrize(("host", "name"), GENERATIONS)
def test_generation_at_a_k_for_each_row(host, name):
    """Beams have rows of their own in a decoder, but not in an encoder."""
    model, k, settings = sparse(host), ROWS, SETTINGS[name]
    if beams := settings.get("num_beams"):
        with pytest.raises(sd.ConfigError, match=r"generate\(\) repeats rows for beams .* k.repeat_interleave\(2\)"):
            generated(model, ROWS, **settings)
        k = {name: ROWS if "encoder." in name else ROWS.repeat_interleave(beams) for name, _ in sd.moe_layers(model)}
    rows = [generated(model, number, IDS[row : row + 1], **settings) for row, number in enumerate(ROWS.tolist())]
    assert torch.equal(generated(model, k, **settings), torch.cat(rows))
    assert len({tuple(generated(model, number, **settings).flatten().tolist()) for number in (1, 4)}) == 2 and sd.get_top_k(model) == 2


def test_generation_by_layer_by_token_and_with_several_sequences():
    model = sparse("llama")
    by_layer = generated(model, [1, 4, 2])
    sd.set_top_k(model, [1, 4, 2])
    assert torch.equal(by_layer, model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY))
    several = {"do_sample": True, "top_k": 1, "num_return_sequences": 2}
    assert torch.equal(generated(model, ROWS.repeat_interleave(2), **several), generated(model, ROWS).repeat_interleave(2, 0))
    with pytest.raises(sd.ConfigError, match=r"k.repeat_interleave\(2\)"):
        generated(model, ROWS, **several)
    with pytest.raises(sd.ConfigError, match=r"for the tokens \[B, T\] of a batch, but an MoE layer got an input \[3, 1, 16\]"):
        generated(model, TOKENS)


@torch.no_grad()
def test_padding_on_the_left_keeps_the_k_of_its_tokens():
    model, mask = sparse("llama"), torch.ones_like(IDS)
    mask[0, :2] = mask[1, :1] = 0
    with sd.top_k(model, TOKENS):
        together = model(IDS, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0)).logits
    assert set(sd.mean_k(model).values()) == {TOKENS[mask > 0].double().mean().item()}
    for row, begin in enumerate((2, 1, 0)):
        with sd.top_k(model, TOKENS[row : row + 1, begin:]):
            torch.testing.assert_close(together[row, begin:], model(IDS[row : row + 1, begin:]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("k", [ROWS, TOKENS], ids=["rows", "tokens"])
@pytest.mark.parametrize("host", ["gpt2", "t5"])
def test_gradient_checkpointing_of_transformers(host, k, reentrant):
    found = []
    for kind in (None, {"use_reentrant": reentrant}):
        model = sparse(host).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if kind:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)
            model.enable_input_require_grads()
        with sd.top_k(model, k):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) > 20
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("k", [1, torch.tensor([1, 4])], ids=["number", "rows"])
def test_trainer_inside_a_block(k, tmp_path):
    """The block's k holds in all passes; what the schedule sets is the default, and saved; what has run is logged."""
    pytest.importorskip("accelerate")
    from tests.library.test_transformers_trainer import rows, trainer

    model, seen = sparse("gpt2"), []
    model.register_forward_hook(lambda *_: seen.append(sum(sd.mean_k(model).values()) / 3))
    schedule = sd.TopKScheduleCallback(lambda step: 1 + step, evaluate_at=4)
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    run = trainer(model, tmp_path, rows(4), [schedule], rows(2), per_device_train_batch_size=2, **often)
    with selecting(model, k), pytest.warns(UserWarning, match=r"train\(\) runs inside a block of top_k or top_p"):
        run.train()
    assert [entry["top_k"] for entry in run.state.log_history] == pytest.approx([*seen, seen[-1]])
    saved = [sd.from_pretrained(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    assert [sd.get_top_k(one) for one in (*saved, model)] == [1, 2, 2]


def gradients(model: nn.Module, x: Tensor, k, scale: int) -> list[Tensor]:
    with selecting(model, k):
        loss = model(x).square().sum() * scale
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]


def one_of_two(rank: int, port: int) -> None:
    """Body of a process of two, each with half of a batch."""
    as_rank(rank, 2, port)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    own, rows = slice(2 * rank, 2 * rank + 2), torch.tensor([1, 4, 2, 3])
    for default, k, of_own in ((3, None, None), (2, 3, 3), (2, [1, 4], [1, 4]), (2, rows, rows[own]), (2, 0.6, 0.6)):
        assert_like_one(own, default, k, of_own)
    torch.distributed.destroy_process_group()  # after those that use it are gone


def assert_like_one(own: slice, default: int, k, of_own) -> None:
    model, wrapped = net(), DistributedDataParallel(net())
    for one in (model, wrapped):
        sd.set_top_k(one, default)
    x = torch.randn(4, T, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(gradients(wrapped, x[own], of_own, 2), gradients(model, x, k, 1))
    assert sd.get_top_k(wrapped) == sd.get_top_k(wrapped.module) == default
    assert wrapped.state_dict()["module.layers.0._extra_state"] == default


def test_two_processes():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: tiny.call(one_of_two, rank, port), range(2)))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3"])
@torch.no_grad()
def test_gate_mass_of_adopted_models(family):
    """Experts are taken in the router's own order, which corrections and groups change, until their probability reaches p."""
    from tests.library.test_native import inputs
    from tests.library.test_native import made as native

    model = sd.adopt(native(family))
    layer = sd.moe_layers(model)[-1][1]
    seen = []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)))
    for p, smallest, largest in (0.3, 1, layer.num_experts), (0.9, 1, layer.num_experts), (0.7, 2, 3), (1.0, 1, layer.num_experts):
        with sd.top_p(model, p, smallest, largest):
            model(**inputs(model), use_cache=False)
        logits = layer.router.logits(seen[-1])
        scores = logits.sigmoid() if layer.router.options.score == "sigmoid" else logits.softmax(-1)
        order = layer.router.ranking(scores).argsort(descending=True)
        reached = (scores / scores.sum(-1, keepdim=True)).gather(1, order).cumsum(-1)
        k = layer.num_experts if p == 1 else ((reached < p).sum(-1) + 1).clamp(smallest, largest)
        assert ((layer.assigned >= 0).sum(1) == k).all(), (p, k)
        for row, chosen in enumerate(layer.assigned.tolist()):
            count = sum(expert >= 0 for expert in chosen)
            assert set(chosen[:count]) == set(order[row, :count].tolist())


def test_model_converted_twice(tmp_path):
    model = sd.moefy(sparse("opt", layers=(0,)), sd.SMoEConfig(8, 5, layers=(1,), init_std=0.3))
    k = torch.tensor([1, 8, 3])  # layers with fewer experts activate all of theirs
    with sd.top_k(model, k), torch.no_grad():
        together = model(IDS).logits
    assert list(sd.mean_k(model).values()) == [pytest.approx(8 / 3), 4.0]
    for row, number in enumerate(k.tolist()):
        with sd.top_k(model, number), torch.no_grad():
            torch.testing.assert_close(together[row], model(IDS[row : row + 1]).logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(model, k), torch.cat([generated(model, n, IDS[i : i + 1]) for i, n in enumerate(k.tolist())]))
    sd.set_top_k(model, [3, 7])
    model.save_pretrained(tmp_path)
    assert sd.get_top_k(sd.from_pretrained(tmp_path)) == sd.get_top_k(model) and sd.get_top_k(sd.slim(model, 1)) == 1


def generator():
    yield


async def stream():
    yield


def test_block_as_a_decorator():
    model = net()

    @sd.top_k(model, 1)
    def plain() -> int:
        return sd.get_top_k(model)

    @sd.top_k(model, 3)
    async def waiting(turns: int) -> list[int]:
        found = []
        for _ in range(turns):
            await asyncio.sleep(0)
            found.append(sd.get_top_k(model))
        return found

    class Served:
        async def __call__(self) -> int:
            return sd.get_top_k(model)

    async def both() -> list:
        return [*await asyncio.gather(waiting(2), waiting(3), sd.top_k(model, 4)(Served())()), sd.get_top_k(model)]

    assert [plain(), plain(), *asyncio.run(both())] == [1, 1, [3, 3], [3, 3, 3], 4, 2] and plain.__name__ == "plain"
    with sd.top_k(model, 1) as inside, pytest.raises(sd.ConfigError, match="this block of top_k, top_p or token_mask was opened before"):
        assert inside is model
        with (again := sd.top_k(model, 3)):
            assert sd.get_top_k(model) == 3
        with again:
            pass
    with pytest.raises(sd.ConfigError, match="a generator function"):
        sd.top_k(model, 1)(lambda: iter(generator()))()

    for function in (generator, stream):
        for block in (sd.top_k(model, 1), sd.top_p(model, 0.5), sd.token_mask(model, torch.ones(1, 1))):
            with pytest.raises(sd.ConfigError, match=f"cannot decorate '{function.__name__}', a generator function"):
                block(function)


def held() -> tuple[int, int]:
    """Objects of the library that are alive, and numbers in tensors."""
    gc.collect()
    alive = [(type(one), one) for one in gc.get_objects()]
    own = [one for kind, one in alive if str(kind.__module__).startswith("smoe_dropout")]
    return len(own), sum(one.numel() for kind, one in alive if kind in (Tensor, nn.Parameter))


def test_requests_leave_nothing_behind():
    model, x = net(), torch.randn(B, T, 8)

    def serve(times: int) -> tuple[int, int]:
        for number in range(times):
            model.train(number % 2 == 0)
            for k in REQUESTS:
                with selecting(model, k):
                    model(x)
        return held()

    objects, numbers = serve(2)
    after = serve(10)
    assert after[0] <= objects and after[1] <= numbers
