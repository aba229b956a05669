"""k belongs to the thread or task that selects it: under load, compiled, checkpointed, generating, and in ways that are refused."""

import asyncio
import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smoe_dropout as sd
from smoe_dropout.routers import LearnedRouter, Router, Routing
from tests.library.test_any_k import ROWS, TOKENS, B, E, T, ids, language_model, net
from tests.library.test_hosts import made

SERVED = {
    "random": {},
    "hash": {"router": "hash"},
    "momentumsmoe": {"router": "learned", "method": "momentumsmoe"},
    "competesmoe": {"router": "learned", "method": "competesmoe"},
    "attention": {"router": "learned", "method": "attention"},
    "similarity": {"router": "learned", "method": "similarity"},
    "thor": {"router": "none", "method": "thor"},  # draws at random: only the number of experts is compared
    "transformers": {"router": "learned"},
}
REQUESTS = [1, 2, 3, 4, [1, 4], [3, 2], ROWS, TOKENS, 0.4, 0.8, None]  # a float is a gate mass, None the default


def served(name: str) -> nn.Module:
    if name != "transformers":
        return language_model(2, **SERVED[name]).eval()
    pytest.importorskip("transformers")
    return sd.moefy(made("gpt2"), sd.SMoEConfig(E, 2, init_std=0.3, **SERVED[name])).eval()


def selecting(model: nn.Module, k):
    if k is None:
        return nullcontext()
    return sd.top_p(model, k) if isinstance(k, float) else sd.top_k(model, k)


@torch.no_grad()
def answer(name: str, model: nn.Module, counted: bool) -> list[Tensor]:
    """Answer of a request: logits, and, unless threads overwrite it, the number of experts of every token."""
    layers = [layer for _, layer in sd.moe_layers(model)]
    if name == "transformers":
        output = model(ids() % 30, output_router_logits=True)
        found = [output.logits, *output.router_logits]
    else:
        found = [model(ids(), ids())[2]][: name != "thor"]
    return found + [(layer.assigned >= 0).sum(1) for layer in layers if counted]


@pytest.mark.parametrize("how", ["threads", "tasks"])
def test_concurrent_requests_are_answered_as_alone(how):
    """1,000 requests of mixed k to eight models, from 8 threads, or from tasks that wait inside their blocks."""
    models = {name: served(name) for name in SERVED}
    requests, expected = [], {}
    for name, model in models.items():
        for number, k in enumerate(REQUESTS):
            if isinstance(k, list) and len(sd.moe_layers(model)) == 3:
                k = [*k, 2]
            if isinstance(k, float) and name in ("hash", "thor"):
                continue
            requests.append((name, number, k))
            with selecting(model, k):
                expected[name, number] = answer(name, model, how == "tasks")
    requests = [requests[i] for i in torch.randint(len(requests), (1000,), generator=torch.Generator().manual_seed(0)).tolist()]

    def right(name: str, number: int, found: list[Tensor]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(found, expected[name, number], strict=True))

    def request(one) -> bool:
        name, number, k = one
        with selecting(models[name], k):
            return right(name, number, answer(name, models[name], how == "tasks"))

    async def task(one, turn: asyncio.Semaphore) -> bool:
        name, number, k = one
        async with turn:
            with selecting(models[name], k):
                await asyncio.sleep(0)
                first = answer(name, models[name], how == "tasks")
                await asyncio.sleep(0)
                return right(name, number, first)

    async def tasks() -> list[bool]:
        turn = asyncio.Semaphore(32)
        return await asyncio.gather(*[task(one, turn) for one in requests])

    if how == "threads":
        with ThreadPoolExecutor(8) as pool:
            outcomes = list(pool.map(request, requests))
    else:
        outcomes = asyncio.run(tasks())
    assert not {request[:2] for request, good in zip(requests, outcomes, strict=True) if not good}
    assert all(sd.get_top_k(model) == 2 for model in models.values())


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture
def compiled():
    """A model, and itself compiled, its graphs run as they are."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = net(router="learned").eval()
    yield model, torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()


def test_compiled_model_follows_the_context_with_a_graph_per_k(compiled):
    model, fast = compiled
    x, counts = torch.randn(B, T, 8), []
    selections = [None, 1, 3, 1, None, [1, 3], ROWS, ROWS.flip(0), TOKENS, TOKENS.flip(0), 0.4, 0.6, 0.7]
    for k in selections:
        with selecting(model, k):
            torch.testing.assert_close(fast(x), model(x))
        counts.append(graphs())
    # of a gate mass the second value makes it a variable
    assert counts == [1, 2, 3, 3, 3, 4, 5, 5, 6, 6, 7, 8, 8] and not torch._dynamo.utils.counters["graph_break"]
    answers = {}

    def request(k: int) -> None:
        with sd.top_k(model, k):
            answers[k] = fast(x)

    threads = [threading.Thread(target=request, args=(k,)) for k in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, y in answers.items():
        with sd.top_k(model, k):
            torch.testing.assert_close(y, model(x))
    assert graphs() == counts[-1]


class Flattened(nn.Module):
    """A network that sees its tokens without their rows, as in OPT."""

    def __init__(self, inner: nn.Module, reentrant: bool | None = None):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        y = self.inner(flat) if self.reentrant is None else checkpoint(self.inner, flat, use_reentrant=self.reentrant)
        return y.view_as(x)


def flattened(reentrant: bool | None = None) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    return sd.moefy(Flattened(inner, reentrant), sd.SMoEConfig(E, 2, init_std=0.5)).train()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("k", [1, ROWS, TOKENS, 0.6], ids=str)
def test_checkpointed_pass_has_the_gradients_of_its_own_k(k, reentrant):
    gradients = []
    for model in (flattened(), flattened(reentrant)):
        x = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with selecting(model, k):
            loss = model(x).square().sum()
        loss.backward()  # outside, at the default k
        gradients.append([x.grad, *[p.grad for p in model.parameters() if p.requires_grad]])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("ks", [[3, 3, 3, 3, 3, 3], [1, 3, 3, 3, 3], [1, 3]], ids=str)
def test_more_passes_of_one_input_than_are_recorded(ks):
    """Either their gradients are right, or the backward pass is refused."""
    gradients = []
    for model in (flattened(), flattened(reentrant=True)):
        x, losses = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(), []
        for k in ks:
            with sd.top_k(model, k):
                losses.append(model(x).square().sum())
        refused = model.reentrant and len({*ks}) > 1
        with pytest.raises(RuntimeError, match="checkpointed passes with the same input") if refused else nullcontext():
            sum(losses).backward()
        gradients.append(x.grad)
    assert refused or torch.allclose(*gradients, atol=1e-5)


def test_flattened_tokens_keep_their_rows():
    model, x = flattened().eval(), torch.randn(B, T, 8)
    with sd.top_k(model, ROWS):
        mixed = model(x)
    for row, k in enumerate(ROWS.tolist()):
        with sd.top_k(model, k):
            torch.testing.assert_close(mixed[row], model(x)[row])


@pytest.mark.parametrize("batch_first", [False, True])
def test_torch_layers_of_both_orders(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
    model = sd.moefy(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), sd.SMoEConfig(E, 2, init_std=0.5)).eval()
    x = torch.randn(B, T, 8)

    def run() -> Tensor:
        return model(x) if batch_first else model(x.transpose(0, 1)).transpose(0, 1)

    for k in (ROWS, TOKENS):
        with sd.top_k(model, k):
            mixed = run()
        k_BT = k if k.dim() == 2 else k[:, None].expand(B, T)
        for number in range(1, E + 1):
            with sd.top_k(model, number):
                torch.testing.assert_close(mixed[k_BT == number], run()[k_BT == number])


def test_blocks_of_generators_that_take_turns_are_refused_and_leave_nothing():
    model = net()

    def stream(k: int):
        with sd.top_k(model, k):
            yield sd.get_top_k(model)

    one, other = stream(1), stream(3)
    assert (next(one), next(other)) == (1, 3)
    with pytest.raises(sd.ConfigError, match="before a block that was entered later"):
        next(one)
    assert next(other, "end") == "end" and sd.get_top_k(model) == 2


def test_block_left_in_another_task_is_refused_and_leaves_nothing():
    model = net()

    async def stream():
        with sd.top_k(model, 1):
            yield sd.get_top_k(model)

    async def run():
        streaming = stream()
        assert await anext(streaming) == 1
        with pytest.raises(sd.ConfigError, match="another thread or task"):
            await asyncio.create_task(anext(streaming))
        assert sd.get_top_k(model) == 2

    asyncio.run(run())


def test_masks_of_tasks_that_wait_do_not_mix():
    model, x = net().eval(), torch.randn(2, 4, 8)

    async def request(real: int) -> int:
        with sd.token_mask(model, torch.arange(8).view(2, 4) < real):
            await asyncio.sleep(0.01 * real)
            model(x)
            return int(sd.moe_layers(model)[0][1].uses[0].tokens)

    async def run() -> list[int]:
        return await asyncio.gather(*map(request, (1, 3, 2)))

    assert asyncio.run(run()) == [1, 3, 2]
    model(x)
    assert sd.moe_layers(model)[0][1].uses[0].real_N is None


def test_copies_made_inside_a_block_have_the_default():
    model, x = net().eval(), torch.randn(3, 8)
    with sd.top_k(model, 1):
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for one in (twin, torch.load(file, weights_only=False)):
            assert sd.get_top_k(one) == 2 and sd.get_top_k(model) == 1
            one(x)
            assert sd.mean_k(one)["layers.0"] == 2.0


class OneK(LearnedRouter):
    """A router that was written for one k."""

    def forward(self, x_ND: Tensor, k: int) -> Routing:
        logits_NE = self.logits(x_ND)
        self.show(logits_NE)
        top_NK, indices_NK = logits_NE.topk(k)
        return Routing(indices_NK, top_NK.softmax(-1), {"mean": logits_NE.mean()})


class Fewer(Router):
    """A router that ignores k."""

    def forward(self, x_ND: Tensor, k: int) -> Routing:
        return Routing(torch.zeros(len(x_ND), 1, dtype=torch.int64), torch.ones(len(x_ND), 1), {})


def test_routers_for_one_k_are_given_the_tokens_of_each():
    model, x = net(router="learned", balance_loss=0.0), torch.randn(B, T, 8)
    with sd.top_k(model, TOKENS):
        expected = model(x)
        for _, layer in sd.moe_layers(model):
            router = OneK(8, layer.config)
            router.load_state_dict(layer.router.state_dict())
            layer.router, router.shared = router, layer.shared
        shown = layer.shared.shown.setdefault(router, [])
        torch.testing.assert_close(model(x), expected)
    assert [logits.shape for logits in shown] == [(B * T, E)] and layer.losses["mean"].item() == pytest.approx(shown[0].mean().item())
    with pytest.raises(sd.ConfigError, match="has no logits"), sd.top_p(model, 0.5):
        model(x)
    router = Fewer(layer.config)
    layer.router, router.shared = router, layer.shared
    with sd.top_k(model, TOKENS), pytest.raises(ValueError, match=r"indices \[4, 1\] for 4 tokens that need k = 2 experts each"):
        layer(x)


class Embedded(nn.Module):
    """Layers behind a token embedding, which can be passed by."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(40, 8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, tokens=None, embedded=None):
        return self.body(self.embed(tokens) if embedded is None else embedded)


def test_hash_router_never_uses_ids_of_another_batch():
    model = sd.moefy(Embedded(), sd.SMoEConfig(E, 2, router="hash")).eval()
    inner, layer = model.embed, sd.moe_layers(model)[0][1]
    with sd.top_k(model, ROWS):
        model(ids())
    for run in (lambda: model(embedded=torch.randn(B, T, 8)), lambda: layer(torch.randn(B, T, 8))):
        with pytest.raises(RuntimeError, match="no token ids"):
            run()
    layer(inner(ids()))  # parts of the model, outside of a pass
    with pytest.raises(RuntimeError, match="no token ids"):
        layer(torch.randn(B, T, 8))
    layer(inner(ids()))


def test_replicas_and_exports():
    model, x = net().eval(), torch.randn(B, T, 8)
    layer = sd.moe_layers(model)[0][1]
    with sd.top_k(model, 3):
        assert layer._replicate_for_data_parallel().default_k == 3
        program = torch.export.export(model, (x,))
        expected = model(x)
    torch.testing.assert_close(program.module()(x), expected)
    with sd.top_k(model, ROWS):
        with pytest.raises(sd.ConfigError, match=r"nn\.DataParallel splits a batch"):
            layer._replicate_for_data_parallel()
        with pytest.raises(sd.ConfigError, match=r"inside torch.vmap, which hides the rows"):
            torch.vmap(model)(x)
        expected = model(x)
        torch.testing.assert_close(torch.func.functional_call(model, dict(model.named_parameters()), x), expected)
    with sd.top_p(model, 0.6):
        torch.testing.assert_close(torch.vmap(model)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precisions(dtype):
    model, x = net(router="learned").eval(), torch.randn(B, T, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32), sd.top_k(model, ROWS):
        y = model(x)
        for row, k in enumerate(ROWS.tolist()):
            with sd.top_k(model, k):
                torch.testing.assert_close(y[row], model(x)[row], rtol=0.02, atol=0.02)
    with sd.top_k(model, ROWS):
        assert model(torch.randn(B, 0, 8)).shape == (B, 0, 8)
