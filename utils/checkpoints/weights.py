"""Loads the weights of a checkpoint into the model to be trained, and stores the model that surgery made."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import nn

import smoe_dropout as sd
from smoe_dropout.io import load_weights, save_model
from smoe_dropout.options import ConfigError
from utils.checkpoints import storage
from utils.checkpoints.manifest import STATE
from utils.checkpoints.origin import Source
from utils.errors import UserError
from utils.flags.models import MODELS


def load(model: nn.Module, source: Source) -> None:
    """Loads all weights into a model of the same sizes. UserError, naming the tensor and both shapes, if they do not fit."""
    folder = source.weights.parent
    if source.flags.get("model") in MODELS and MODELS[source.flags["model"]].from_folder:
        return  # it was built with them
    try:
        if source.from_transformers:
            host = sd.from_pretrained(folder).train()  # which alone imports transformers
            if (found := host.get_input_embeddings().weight.shape) != (expected := model.host.get_input_embeddings().weight.shape):
                raise ConfigError(f"its embedding has shape {tuple(found)}, and the tokenizer needs {tuple(expected)}")
            model.host = host  # the host and its configuration, which may differ from ours
        else:
            if source.config_sha256 or (folder / STATE).exists():  # a checkpoint; load_weights verifies a folder of save_model
                storage.Checkpoint(folder, source.config_sha256, weights_sha256=source.weights_sha256)
            k = [(layer, layer.default_k) for _, layer in sd.moe_layers(model)]
            load_weights(model, folder)
            for layer, own in k:  # k is what the flags say, not what the folder was saved with
                layer.default_k = own
    except (ConfigError, RuntimeError) as error:
        raise UserError(f"the checkpoint {source.path} cannot be loaded: {' '.join(str(error).split())}") from None


def store(model: nn.Module, checkpoints: Path, config_sha256: str) -> None:
    """Writes the model as the checkpoint at step 0 of the run with this identity, atomically. UserError if it cannot be written."""
    try:
        writer = storage.Writer(checkpoints, 0, is_main=True)
        save_model(model, writer.partial, manifest=False)  # the checkpoint has its own
        writer.add_json(STATE, {"step": 0, "best_step": 0, "config_sha256": config_sha256})
        writer.finish()
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model cannot be saved in {checkpoints}: {error}; fix that and run the same command again") from None


class HandedOver(NamedTuple):
    """kept: number of pre-trained parameters in the model for the task. new: its other parameters. unused: pre-trained ones it lacks."""

    kept: int
    new: list[str]
    unused: list[str]


def handed_over(stored: dict[str, nn.Parameter], model: nn.Module) -> HandedOver:
    """Compares a model with the parameters `stored` of the pre-trained model it was made from."""
    ours, theirs = dict(model.named_parameters()), {id(parameter) for parameter in stored.values()}
    used = {id(parameter) for parameter in ours.values()}
    return HandedOver(
        sum(parameter.numel() for parameter in stored.values() if id(parameter) in used),
        [name for name, parameter in ours.items() if id(parameter) not in theirs],
        [name for name, parameter in stored.items() if id(parameter) not in used],
    )
