"""Weights of a checkpoint into the model that is trained, and of a model that surgery made into a checkpoint."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from smoe_dropout import from_pretrained
from smoe_dropout.io import WEIGHTS, load_weights, save_model
from smoe_dropout.options import ConfigError
from utils.checkpoints import storage
from utils.checkpoints.origin import Source
from utils.errors import UserError


def load(model: nn.Module, source: Source) -> None:
    """All of the weights, into the model they were made in. UserError, naming the tensor and both shapes, where they do not fit."""
    folder = source.weights.parent
    try:
        if source.weights.name == WEIGHTS and (folder / storage.MANIFEST).exists():
            storage.verify(folder)
        if source.of_transformers:
            host = from_pretrained(folder).train()
            if (found := host.get_input_embeddings().weight.shape) != (wanted := model.host.get_input_embeddings().weight.shape):
                raise ConfigError(f"its embedding has shape {tuple(found)}, and {tuple(wanted)} goes with the tokenizer")
            model.host = host  # all of it: its settings may be others than ours
        else:
            load_weights(model, folder)
    except (ConfigError, RuntimeError) as error:
        raise UserError(f"the checkpoint {source.path} cannot be loaded: {' '.join(str(error).split())}") from None


def store(model: nn.Module, checkpoints: Path) -> None:
    """As a run's checkpoint at step 0, whole or not there."""
    writer = storage.Writer(checkpoints, 0, is_main=True)
    save_model(model, writer.partial)
    writer.add_json("state.json", {"best_step": 0})
    writer.finish()


class HandedOver(NamedTuple):
    """Of the pre-trained model: how many parameters the fine-tuned one kept, which are new in that, and which were left behind."""

    kept: int
    new: list[str]
    unused: list[str]


def handed_over(stored: dict[str, nn.Parameter], model: nn.Module) -> HandedOver:
    """`stored`: the parameters of the pre-trained model, before it became a part of `model`."""
    ours, theirs = dict(model.named_parameters()), {id(parameter) for parameter in stored.values()}
    there = {id(parameter) for parameter in ours.values()}
    return HandedOver(
        sum(parameter.numel() for parameter in stored.values() if id(parameter) in there),
        [name for name, parameter in ours.items() if id(parameter) not in theirs],
        [name for name, parameter in stored.items() if id(parameter) not in there],
    )
