"""transformers' Trainer: k follows its schedule, the loss includes the auxiliary losses, and resumed runs equal uninterrupted ones."""

import copy
import inspect
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smoe_dropout as sd
from smoe_dropout.routers import switch_balance_loss
from tests.library.test_hosts import CAUSAL, GPT2, SMALL, TOKENS, made

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BALANCE, STEPS = 0.7, 12


def undropped(host: str) -> nn.Module:
    """A model without dropout, so that losses can be computed by hand."""
    torch.manual_seed(0)
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if host == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, max_position_embeddings=20))
    elif host == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **off, max_position_embeddings=20))
    else:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.2)
    return model


def sparse(host: str, **settings) -> nn.Module:
    return sd.moefy(
        undropped(host), sd.SMoEConfig(**{"num_experts": 4, "top_k": 2, "router": "learned", "balance_loss": BALANCE, **settings})
    )


def rows(count: int, even: bool = True) -> list[dict[str, torch.Tensor]]:
    """Rows of 9 tokens with all labels, or with ever fewer if not `even`."""
    tokens = torch.randint(3, 31, (count, 9), generator=torch.Generator().manual_seed(2))
    labels = tokens.clone()
    if not even:
        for row in range(count):
            labels[row, 1 : 1 + row] = -100
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def trainer(model: nn.Module, folder, data=None, callbacks=(), eval_data=None, **arguments):
    defaults = {
        **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "max_steps": 1, "seed": 3},
        **{
            "max_grad_norm": 0.0,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "learning_rate": 0.1,
            "train_sampling_strategy": "sequential",
        },
    }
    settings = transformers.TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    return transformers.Trainer(
        model, settings, train_dataset=rows(8) if data is None else data, eval_dataset=eval_data, callbacks=list(callbacks)
    )


def losses(trained) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def ks(trained) -> list[int]:
    return [entry["top_k"] for entry in trained.state.log_history if "loss" in entry]


def by_hand(model: nn.Module, batch: list[dict], causal: bool, shifted: bool = True) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Summed cross-entropy, balance losses, and number of labels, computed without hooks.

    The Trainer does not know that GPT-2 shifts its labels, so it also counts the first one.
    """
    tokens, labels = (torch.stack([row[name] for row in batch]) for name in ("input_ids", "labels"))
    logits = model(tokens).logits
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    counted = labels if shifted else torch.stack([row["labels"] for row in batch])
    return cross_entropy, sd.auxiliary_loss(model), int((counted != -100).sum())


# the loss


@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_models_loss_includes_the_balance_loss_in_training_only(host):
    model = sparse(host).train()
    cross_entropy, balance, items = by_hand(model, rows(2), host in CAUSAL)
    tokens = torch.stack([row["input_ids"] for row in rows(2)])
    expected, plain = (cross_entropy / items + balance).item(), (cross_entropy / items).item()
    assert balance.item() > 0.5 and model(tokens, labels=tokens).loss.item() == pytest.approx(expected, rel=1e-5)
    assert model(tokens, labels=tokens, return_dict=False)[0].item() == pytest.approx(expected, rel=1e-5)
    assert copy.deepcopy(model)(tokens, labels=tokens).loss.item() == pytest.approx(expected, rel=1e-5)
    assert model(tokens).loss is None and model(tokens, return_dict=False)[0].dim() == 3
    assert model.eval()(tokens, labels=tokens).loss.item() == pytest.approx(plain, rel=1e-5)


def test_labels_by_position():
    model = sparse("llama").train()
    tokens = torch.stack([row["input_ids"] for row in rows(2)])
    signature = list(inspect.signature(model.forward).parameters)
    before = [None] * (signature.index("labels") - 1)
    expected = model(tokens, labels=tokens).loss.item()
    assert model(tokens, *before, tokens, return_dict=False)[0].item() == pytest.approx(expected, rel=1e-6)
    assert model(tokens, *before, tokens, num_items_in_batch=32).loss.item() == pytest.approx(expected / 2, rel=1e-5)


def test_hook_of_a_copy_uses_the_copy():
    model = sparse("bert").train()
    twin = copy.deepcopy(model)
    model(TOKENS, labels=TOKENS)
    for _, layer in sd.moe_layers(twin):
        layer.router.balance_loss = 0.0
    assert model(TOKENS, labels=TOKENS).loss.item() - twin(TOKENS, labels=TOKENS).loss.item() > 0.5


@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("host", ["bert", "gpt2", "llama"])
def test_logged_loss_is_cross_entropy_plus_balance_loss(host, accumulated, tmp_path):
    """Micro-batches of a causal model are weighted by their labels; those of BERT, whose loss is a mean, equally."""
    model, data = sparse(host), rows(8, even=False)
    size = 8 // accumulated
    hand = copy.deepcopy(model).train()
    parts = [by_hand(hand, data[start : start + size], host in CAUSAL, host != "gpt2") for start in range(0, 8, size)]
    total = sum(items for *_, items in parts)
    shares = [items / total if host in CAUSAL else 1 / accumulated for *_, items in parts]
    expected = sum(share * (ce.item() / items + balance.item()) for share, (ce, balance, items) in zip(shares, parts, strict=True))
    run = trainer(model, tmp_path, data, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
    run.train()
    assert losses(run) == [pytest.approx(expected, rel=1e-4)]


@pytest.mark.parametrize("host", ["bert", "llama"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(host, tmp_path):
    """For the cross-entropy only, since the balance loss of parts is not that of the whole batch."""
    steps = []
    for accumulated in (1, 2):
        model = sparse(host, balance_loss=0.0)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        trainer(model, tmp_path, per_device_train_batch_size=8 // accumulated, gradient_accumulation_steps=accumulated).train()
        steps.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
    assert steps[0].keys() == steps[1].keys() and any(step.abs().max() > 1e-4 for step in steps[0].values())
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], step, rtol=1e-3, atol=1e-6)


def test_trainer_trains_the_balance_loss(tmp_path):
    """One step moves the router by the gradient of cross-entropy plus balance loss."""
    model = sparse("llama")
    hand = copy.deepcopy(model).train()
    cross_entropy, balance, items = by_hand(hand, rows(8), causal=True)
    (cross_entropy / items + balance).backward()
    before = [layer.router.weight.detach().clone() for _, layer in sd.moe_layers(model)]
    trainer(model, tmp_path, per_device_train_batch_size=8).train()
    for (_, layer), start, (_, expected) in zip(sd.moe_layers(model), before, sd.moe_layers(hand), strict=True):
        torch.testing.assert_close(layer.router.weight, start - 0.1 * expected.router.weight.grad, rtol=1e-4, atol=1e-6)


def test_balance_loss_is_the_switch_loss():
    model = sparse("bert").train()
    inputs = {}
    for name, layer in sd.moe_layers(model):
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    model(TOKENS, labels=TOKENS)
    expected = sum(
        BALANCE * switch_balance_loss(layer.router.logits(inputs[name].flatten(0, 1)), layer.assigned)
        for name, layer in sd.moe_layers(model)
    )
    assert sd.auxiliary_loss(model).item() == pytest.approx(expected.item(), rel=1e-5)


def test_other_models_are_unchanged():
    model = sd.moefy(nn.Sequential(made("bert")), sd.SMoEConfig(4, 2, router="learned"))
    tokens = torch.stack([row["input_ids"] for row in rows(2)])
    torch.manual_seed(0)
    loss = model.train()[0](tokens, labels=tokens).loss
    torch.manual_seed(0)
    assert torch.equal(F.cross_entropy(model[0](tokens).logits.flatten(0, 1), tokens.flatten()), loss)
    assert type(model[0].config) is transformers.BertConfig and sd.auxiliary_loss(model) > 0


# the schedule


@pytest.mark.parametrize(("mode", "total"), [("linear_increase", None), ("cosine_decrease", 4), ("elastic", None), ("constant", 2)])
def test_k_follows_the_schedule(mode, total, tmp_path):
    """k is set before each step, equal in all its micro-batches, and keeps its last value after training."""
    model, seen = sparse("bert", router="random", balance_loss=None), []
    model.register_forward_pre_hook(lambda *_: seen.append((sd.get_top_k(model), layer.step)))
    layer = sd.moe_layers(model)[0][1]
    callback = sd.TopKScheduleCallback(mode, 1, 4, total_steps=total, seed=5)
    run = trainer(model, tmp_path, callbacks=[callback], max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    run.train()
    schedule = sd.TopKSchedule(mode, 1, 4, total or 6, seed=5)
    assert seen == [(schedule(step), step) for step in range(6) for _ in range(2)]
    assert ks(run) == [schedule(step) for step in range(6)] and sd.get_top_k(model) == schedule(5)


@pytest.mark.parametrize(
    ("build", "arguments", "extra", "words"),
    [
        (partial(sparse, "bert"), ("constant", 1, 5), {}, "k_max = 5 is more than the 4 experts of layer 'bert.encoder.layer.0"),
        (partial(undropped, "bert"), ("constant", 1, 2), {}, "BertForMaskedLM has no MoE layers"),
        (
            partial(sparse, "bert"),
            ("constant", 1, 2),
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor = 0.1: .* set balance_loss=0",
        ),
    ],
)
def test_training_rejects_invalid_setups(build, arguments, extra, words, tmp_path):
    with pytest.raises(sd.ConfigError, match=words):
        trainer(build(), tmp_path, callbacks=[sd.TopKScheduleCallback(*arguments)], **extra).train()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("linear_increas", 1, 2), "nearest: linear_increase"), (("constant", 3, 2), "k_min = 3"), (("constant", 1, 2, -1), "-1")],
)
def test_invalid_schedules_are_rejected_immediately(arguments, words):
    with pytest.raises(ValueError, match=words):
        sd.TopKScheduleCallback(*arguments)


@pytest.mark.parametrize("smoothed", ["random", "learned"])
def test_label_smoothing_works_without_balance_loss(smoothed, tmp_path):
    model = sparse("gpt2", router=smoothed, balance_loss=None if smoothed == "random" else 0.0)
    run = trainer(model, tmp_path, callbacks=[sd.TopKScheduleCallback("constant", 1, 2)], label_smoothing_factor=0.1)
    run.train()
    assert all(map(math.isfinite, losses(run)))


def test_evaluation_at_another_k(tmp_path):
    model = sparse("bert")
    run = trainer(model, tmp_path, callbacks=[sd.TopKScheduleCallback("constant", 1, 3)])
    run.train()
    run.eval_dataset = rows(4)
    run.evaluate()
    assert [entry["top_k"] for entry in run.state.log_history if "eval_loss" in entry] == [3]
    found = {}
    for k in (1, 4):
        with sd.top_k(model, k):
            found[k] = run.evaluate()["eval_loss"]
    assert found[1] != found[4] and sd.get_top_k(model) == 3


def test_schedule_is_a_function(tmp_path):
    model = sparse("bert")
    run = trainer(model, tmp_path, callbacks=[sd.TopKScheduleCallback(lambda step: 4 - step)], max_steps=3)
    run.train()
    assert ks(run) == [4, 3, 2]
    for wrong in ((lambda step: 1, 1, 2), ("constant",)):
        with pytest.raises(ValueError, match=r"takes neither|needs k_min and k_max"):
            sd.TopKScheduleCallback(*wrong)
    with pytest.raises(ValueError, match="k = 5 must be a whole number from 1 to the 4 experts"):
        trainer(model, tmp_path, callbacks=[sd.TopKScheduleCallback(lambda step: 5)]).train()
    with pytest.raises(sd.ConfigError, match="evaluate_at = 5 is more than the 4 experts"):
        trainer(model, tmp_path, callbacks=[sd.TopKScheduleCallback("constant", 1, 2, evaluate_at=5)]).train()


def test_evaluations_and_loggers(tmp_path, monkeypatch):
    """Every evaluation runs at a fixed k, and TensorBoard has what the log history has."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model, seen = sparse("bert"), []
    callback = sd.TopKScheduleCallback(lambda step: 1 + step, evaluate_at=2)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "report_to": ["tensorboard"]}
    evaluated = {"one": rows(4), "other": rows(4)}
    run = trainer(model, tmp_path, callbacks=[callback], eval_data=evaluated, max_steps=3, eval_on_start=True, **settings)
    model.register_forward_hook(lambda model, *_: seen.append((model.training, sd.get_top_k(model))))
    run.train()
    assert [k for training, k in seen if training] == ks(run) == [1, 2, 3]
    assert {k for training, k in seen if not training} == {2} and len(seen) == 3 + 8
    evaluated = [entry for entry in run.state.log_history if any(name.startswith("eval_") for name in entry)]
    assert len(evaluated) == 8 and all(entry["top_k"] == 2 for entry in evaluated)
    assert [sd.get_top_k(sd.from_pretrained(tmp_path / f"checkpoint-{step}")) for step in (1, 2, 3)] == [1, 2, 3]
    board = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    logged = {name: [event.value for event in board.Scalars(f"{name}")] for name in board.Tags()["scalars"]}
    assert logged["train/top_k"][:3] == [1, 2, 3] and set(logged["eval/top_k"]) == {2}
    history = [entry["expert_entropy"] for entry in run.state.log_history if "loss" in entry]
    assert logged["train/expert_entropy"][:3] == pytest.approx(history) and all(0 < value <= 1 for value in history)
    assert all(value >= 1 for value in logged["train/expert_load_max"])
    run.evaluate(rows(4))
    assert seen[-1] == (False, 3)


def test_predictions_are_logits_only(tmp_path):
    model = sparse("bert")
    model.config.output_router_logits = True
    assert trainer(model, tmp_path).predict(rows(4)).predictions.shape == (4, 9, 31)


def test_statistics_of_the_expert_load():
    model = sparse("bert", router="random", balance_loss=None)
    from smoe_dropout.hf.callback import load_statistics

    assert load_statistics(model) == {}
    with sd.top_k(model, 4):
        model(TOKENS)
        assert load_statistics(model) == pytest.approx({"expert_entropy": 1.0, "expert_load_max": 1.0})
    for _, layer in sd.moe_layers(model):
        layer.router.bias.data[:2] += 1000.0
    model(TOKENS)
    assert load_statistics(model) == pytest.approx({"expert_entropy": 0.5, "expert_load_max": 2.0})


# resumed runs, precision


@pytest.mark.parametrize(("router", "mode"), [("learned", "linear_increase"), ("noisy_top_k", "elastic")])
def test_resumed_run_equals_the_uninterrupted_one(router, mode, tmp_path):
    """k and losses are equal, and the checkpoint loads as a model with its k."""
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 6, "optim": "adamw_torch"}
    settings |= {"train_sampling_strategy": "random", "lr_scheduler_type": "linear", "learning_rate": 0.01}

    def build():
        torch.manual_seed(0)
        return sd.moefy(made("bert"), sd.SMoEConfig(4, 2, router=router))

    def run(model, folder):
        return trainer(model, folder, rows(10), callbacks=[sd.TopKScheduleCallback(mode, 1, 4, seed=1)], **settings)

    whole = run(build(), tmp_path / "whole")
    whole.train()
    again = run(build(), tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert len(losses(whole)) == STEPS and losses(again) == losses(whole) and ks(again) == ks(whole)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True))
    checkpoint = sd.from_pretrained(tmp_path / "whole" / "checkpoint-12")
    assert sd.get_top_k(checkpoint) == ks(whole)[-1]
    with torch.no_grad():
        assert torch.equal(checkpoint(TOKENS).logits, whole.model.eval()(TOKENS).logits)


@pytest.mark.parametrize("host", ["bert", "gpt2"])
def test_bfloat16_autocast(host, tmp_path):
    run = trainer(
        sparse(host), tmp_path, callbacks=[sd.TopKScheduleCallback("linear_increase", 1, 4)], bf16=True, max_steps=4, learning_rate=0.3
    )
    plain = trainer(sparse(host), tmp_path, callbacks=[sd.TopKScheduleCallback("linear_increase", 1, 4)], max_steps=4, learning_rate=0.3)
    run.train(), plain.train()
    assert losses(run) == pytest.approx(losses(plain), rel=0.02) and losses(run) != losses(plain)
    assert losses(run)[-1] < losses(run)[0] and {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
