"""The model that a run has made of a folder of transformers, as such a folder again."""

import shutil
from pathlib import Path

from safetensors import SafetensorError
from torch import nn

import smoe_dropout as sd
from smoe_dropout.adapters import merged
from utils.checkpoints.origin import Source
from utils.checkpoints.run_files import MODEL
from utils.errors import TrainingError
from utils.training.run import Callback, Run

# what transformers needs besides the model, where the folder has it
BESIDE = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece", "sentencepiece")


class Export(Callback):
    """Writes the tested weights to `model` in the run's folder, with the tokenizer and all experts active, adapters merged into the maps.
    transformers' auto classes, smoe_dropout.from_pretrained and the programs here load it.

    The last weights are the ones tested: the best at one k, of a training of all, would be those that have learned least of the others.
    """

    selects_best = False

    def __init__(self, source: Source):
        self.source = source

    def finished(self, run: Run, model: nn.Module) -> nn.Module:
        if run.engine.is_main:
            folder = Path(run.flags.work_dir) / MODEL
            try:
                self._write(merged(model).host, folder)
            except (OSError, SafetensorError) as error:
                raise TrainingError(f"{folder} cannot be written ({error}): fix that, and run the same command again") from None
        return model

    def _write(self, host: nn.Module, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for path in sorted(self.source.weights.parent.iterdir()):
            if path.is_file() and path.name.startswith(BESIDE):
                shutil.copyfile(path, folder / path.name)
        if not sd.moe_layers(host):
            return host.save_pretrained(folder)
        k = [(layer, layer.default_k) for _, layer in sd.moe_layers(host)]
        sd.set_top_k(host, max(layer.num_experts for layer, _ in k))
        sd.save_pretrained(host, folder)
        for layer, own in k:
            layer.default_k = own
