"""TRL's trainers train the balance loss exactly once."""

import copy

import pytest
import torch

import smoe_dropout as sd
from tests.library.test_transformers_trainer import BALANCE, rows, sparse

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
transformers = pytest.importorskip("transformers")

ARGUMENTS = {
    **{"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "max_steps": 1},
    **{"max_grad_norm": 0.0, "optim": "sgd", "lr_scheduler_type": "constant", "learning_rate": 0.1, "seed": 3},
    **{"gradient_checkpointing": False, "train_sampling_strategy": "sequential"},
}


def tokenizer():
    """Words of single numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {str(word): word for word in range(30)} | {"<pad>": 30}
    base = Tokenizer(models.WordLevel(words, unk_token="0"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=base, pad_token="<pad>", eos_token="0", unk_token="0")


def moved(model, trained) -> list[torch.Tensor]:
    """Change of the routers in a step of SGD, divided by the negative learning rate."""
    before = [layer.router.weight.detach().clone() for _, layer in sd.moe_layers(model)]
    trained.train()
    return [(start - layer.router.weight.detach()) / 0.1 for start, (_, layer) in zip(before, sd.moe_layers(model), strict=True)]


def gradient(model, auxiliary: float, batches: list[list[dict]]) -> list[torch.Tensor]:
    """Gradient of the routers by hand: mean cross-entropy of all labels plus `auxiliary` times the mean balance loss of the batches."""
    model = copy.deepcopy(model).train()
    labels = sum(len(row["input_ids"]) - 1 for batch in batches for row in batch)
    for batch in batches:
        tokens = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in batch], batch_first=True, padding_value=30)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in batch], batch_first=True)
        logits = model(tokens, attention_mask=mask).logits[:, :-1]
        chosen = logits.log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        (-(chosen * mask[:, 1:]).sum() / labels + auxiliary * sd.auxiliary_loss(model) / len(batches)).backward()
    return [layer.router.weight.grad for _, layer in sd.moe_layers(model)]


def texts(count: int) -> list[dict]:
    """Rows of different lengths."""
    return [{"input_ids": row["input_ids"][: 9 - place % 4] % 30} for place, row in enumerate(rows(count))]


@pytest.mark.parametrize(("host", "accumulated"), [("gpt2", 1), ("llama", 2)])
@pytest.mark.parametrize(("coefficient", "auxiliary"), [(None, 1.0), (BALANCE / 2, 0.5), (0.0, 0.0)])
def test_supervised_fine_tuning(host, coefficient, auxiliary, accumulated, tmp_path):
    model, data = sparse(host), texts(4)
    size = 4 // accumulated
    expected = gradient(model, auxiliary, [data[start : start + size] for start in range(0, 4, size)])
    arguments = {
        **ARGUMENTS,
        "router_aux_loss_coef": coefficient,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulated,
    }
    dataset = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in data])
    trainer = trl.SFTTrainer(model, trl.SFTConfig(str(tmp_path), **arguments), train_dataset=dataset, processing_class=tokenizer())
    for found, wanted in zip(moved(model, trainer), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_weighted_losses(tmp_path):
    """TRL's `dft` loss weighs tokens itself; the coefficient decides how much of the balance loss is added."""
    moves = []
    for coefficient in (0.0, None):
        model = sparse("llama")
        arguments = {**ARGUMENTS, "router_aux_loss_coef": coefficient, "per_device_train_batch_size": 4, "loss_type": "dft"}
        dataset = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in texts(4)])
        moves.append(
            moved(model, trl.SFTTrainer(model, trl.SFTConfig(str(tmp_path), **arguments), None, dataset, processing_class=tokenizer()))
        )
    assert_difference(moves, sparse("llama"), [texts(4)])


def test_preference_optimisation(tmp_path):
    """DPO asks for the balance loss by argument only."""
    pairs = [{"prompt": "4 5 6", "chosen": " 7 8 9 10", "rejected": " 11 12"}, {"prompt": "9", "chosen": " 3", "rejected": " 4 5 6"}]
    moves, batches = [], []
    for coefficient in (0.0, None):
        model = sparse("llama")
        model.register_forward_pre_hook(lambda _, inputs, named: batches.append(named), with_kwargs=True)
        arguments = {**ARGUMENTS, "router_aux_loss_coef": coefficient, "per_device_train_batch_size": 2}
        arguments.pop("train_sampling_strategy")
        trainer = trl.DPOTrainer(
            model,
            copy.deepcopy(model),
            trl.DPOConfig(str(tmp_path), **arguments),
            None,
            datasets.Dataset.from_list(pairs),
            processing_class=tokenizer(),
        )
        moves.append(moved(model, trainer))
    tokens, mask = batches[0]["input_ids"], batches[0]["attention_mask"]
    assert_difference(moves, sparse("llama"), [[{"input_ids": row[real.bool()]} for row, real in zip(tokens, mask, strict=True)]])


def assert_difference(moves: list[list[torch.Tensor]], model, batches: list[list[dict]]) -> None:
    """Assert that the second step differs from the first by the gradient of the balance loss."""
    without, together = (gradient(model, auxiliary, batches) for auxiliary in (0.0, 1.0))
    for first, second, none, one in zip(*moves, without, together, strict=True):
        assert (one - none).abs().max() > 1e-3
        torch.testing.assert_close(second - first, one - none, rtol=1e-3, atol=1e-5)
