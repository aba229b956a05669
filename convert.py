"""Makes a trained transformers model slimmable without training it: cuts its FFNs into experts, fits routers, measures the loss at each k.

    python convert.py --from FOLDER --data text.txt --out slimmable
    python convert.py --from model.gguf --data text.txt --out slimmable --num_experts 32
    python convert.py --from owner/name --data text.txt.xz --out slimmable --cut weights --router random

The folder it writes loads with smoe_dropout.from_pretrained, or AutoModel after `import smoe_dropout`. The tokenizer is in it, and
conversion.json says what was done and measured. `python convert.py --help` lists the flags.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before exit_on_user_error handles signals

from utils.errors import UserError, exit_on_user_error

if __name__ == "__main__":
    with exit_on_user_error():  # before torch is imported, so that a wrong flag is refused at once
        from utils.cli.convert import parse

        FLAGS, ORIGIN = parse()

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import smoe_dropout as sd
from smoe_dropout.manifest import sha256
from utils import documents
from utils.checkpoints.storage import require_space
from utils.cli.convert import ACCOUNT, Origin, is_finished
from utils.data.plain_text import read_text, windows
from utils.flags.fields import ConvertFlags

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HELD_OUT = 10  # one part in so many of the text
CHARACTERS = 16  # of a token at most, on average: what is read of a long text

Pass = tuple[Callable[[], Tensor], None]


def load(origin: Origin, precision: str, device: str) -> tuple[nn.Module, Any]:
    """The model, of the class that its configuration names, and its tokenizer. UserError if transformers cannot load them."""
    file = {} if origin.gguf is None else {"gguf_file": origin.gguf}
    dtype = PRECISIONS.get(precision) or (torch.float32 if origin.gguf else "auto")
    try:
        config = transformers.AutoConfig.from_pretrained(origin.place, **file)
        names = getattr(config, "architectures", None) or []
        kind = getattr(transformers, names[0], None) if names else transformers.AutoModelForCausalLM
        model = (kind or transformers.AutoModel).from_pretrained(origin.place, dtype=dtype, **file)
        tokenizer = transformers.AutoTokenizer.from_pretrained(origin.place, **file)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--from {origin.place} cannot be loaded by transformers: {error}") from None
    if origin.gguf is not None:  # its weights are whole numbers no more, but transformers refuses to save what it read from such a file
        model.hf_quantizer = None
        del model.config.quantization_config
    return model.to(device).eval(), tokenizer


def read(path: str, tokens: int, held_out: int) -> tuple[str, str]:
    """The beginning of a text and of its last tenth, each as much as so many tokens may take. UserError if it is no text, or empty."""
    text = read_text(path)
    if not text.strip():
        raise UserError(f"--data {path} is empty: give a text of some thousands of words")
    end = len(text) - len(text) // HELD_OUT
    return text[: min(end, tokens * CHARACTERS)], text[end:][: held_out * CHARACTERS]


def passes(model: nn.Module, tokenizer: Any, text: str, tokens: int, length: int) -> list[Pass]:
    """Passes over a text that return the model's loss or, of a model that does not write, the relative change of its output."""
    writes = model.can_generate()
    return [
        ((likelihood if writes else Change)(model, torch.tensor([ids], device=model.device)), None)
        for ids in windows(text, tokenizer, tokens, length, writes)
    ]


def likelihood(model: nn.Module, ids_1T: Tensor) -> Callable[[], Tensor]:
    return lambda: model(input_ids=ids_1T, labels=ids_1T).loss


class Change:
    """Squared distance of the model's output from that of the first pass, over its square."""

    def __init__(self, model: nn.Module, ids_1T: Tensor):
        self.model, self.ids_1T, self.first = model, ids_1T, None

    def __call__(self) -> Tensor:
        output = self.model(input_ids=self.ids_1T)[0].float()
        self.first = output if self.first is None else self.first
        return (output - self.first).square().sum() / self.first.square().sum()


def main(flags: ConvertFlags, origin: Origin) -> None:
    if flags.threads:
        torch.set_num_threads(flags.threads)
    hashes = {"data_sha256": sha256(Path(flags.data)), "weights_sha256": {path.name: sha256(path) for path in origin.weights}}
    if is_finished(flags):
        made = documents.read(Path(flags.out, ACCOUNT), dict, "remove the folder and convert again")
        if any(made[name] != found for name, found in hashes.items()):
            raise UserError(f"--out {flags.out} was made of another text or of other weights: choose a new folder")
        print(f"done already: {flags.out}")
        return
    device = ("cuda" if torch.cuda.is_available() else "cpu") if flags.device == "auto" else flags.device
    texts = read(flags.data, flags.tokens, flags.held_out)
    model, tokenizer = load(origin, flags.precision, device)
    length = min(flags.length, getattr(model.config, "max_position_embeddings", None) or flags.length)
    counts = flags.tokens, flags.held_out
    calibrating, measuring = (passes(model, tokenizer, text, count, length) for text, count in zip(texts, counts, strict=True))
    if not calibrating or not measuring:
        raise UserError(f"--data {flags.data} is too short: give a text of some thousands of words")
    require_space(Path(flags.out), list(model.state_dict().values()), copies=1, flag="--out")
    done = sd.convert(
        model,
        calibrating,
        flags.num_experts,
        measuring,
        **{
            name: getattr(flags, name)
            for name in ("cut", "router", "shared_experts", "correction", "tokens", "seed", "expert_init", "gate_weight")
        },
        say=lambda line: print(line, flush=True),
    )
    if flags.k is not None:
        sd.set_top_k(model, flags.k)
    write(model, tokenizer, flags, asdict(done) | hashes)
    print(done)
    if not model.can_generate():
        print("  the loss is the relative change of the output, as the model writes no text")
    print(f"done: {flags.out}")


def write(model: nn.Module, tokenizer: Any, flags: ConvertFlags, account: dict[str, Any]) -> None:
    """Write the folder, which is complete or absent. account: what was done, and with what."""
    out = Path(flags.out)
    partial = out.with_name(f"{out.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)  # of an interrupted run
    sd.save_pretrained(model, partial)
    tokenizer.save_pretrained(partial)
    versions = {"versions": {"smoe_dropout": sd.__version__, "torch": torch.__version__, "transformers": transformers.__version__}}
    losses = {"losses": {str(k): loss for k, loss in account["losses"].items()}}
    documents.write(partial / ACCOUNT, account | losses | {"flags": asdict(flags)} | versions)
    if out.is_dir():
        out.rmdir()
    partial.rename(out)


if __name__ == "__main__":
    with exit_on_user_error():
        main(FLAGS, ORIGIN)
