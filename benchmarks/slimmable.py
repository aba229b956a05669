"""A trained model of transformers made slimmable: exactness, perplexity and time of converted folders at every k against the dense model.

    python -m benchmarks slimmable cut=FOLDER fitted=FOLDER recovered=FOLDER --dense FOLDER --text HELD_OUT.txt

Every number goes to the record when it has been found: the same command continues where an earlier one stopped.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import smoe_dropout as sd
from benchmarks.measure import SCHEMA, Common, environment, interleave, summarise
from benchmarks.slimmable_table import DENSE, OTHER, RECORDS, Slimmable, quality_table
from smoe_dropout.files import read_object
from smoe_dropout.hf.described import NAME
from smoe_dropout.manifest import checksum, sha256
from utils import documents
from utils.errors import UserError

ROWS = 1  # sequences in a pass: logits of a large vocabulary take room
TIMES = ("seconds", "ratio", "ratio_min", "ratio_max")


@dataclass(frozen=True)
class SlimmableFlags(Common):
    """Quality and time of converted folders at every k against the dense model that they were made of."""

    converted: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """STAGE=FOLDER, such as fitted=out/smollm2"""
    dense: Path | None = None
    """folder of the dense model"""
    others: tuple[Path, ...] = ()
    """folders of dense models of other sizes"""
    text: Path | None = None
    """held-out text, which no calibration and no training has seen"""
    package: str = ""
    """where the weights come from, as a package and its version"""
    origin: Path | None = None
    """file that the dense folder was made of, such as a GGUF file, for its hash"""
    k: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    """numbers of active experts"""
    tokens: int = 8_192
    """tokens of the text that quality is measured on, at most"""
    context: int = 512
    """tokens of a sequence"""
    prompt: int = 8
    """tokens before those that are generated"""
    generated: int = 32
    """tokens generated in a round; 0: no time is measured"""
    rounds: int = 9
    """measured rounds, after one warm-up round"""
    calibration: Path | None = None
    """text to fit conversions to: measures the ways to convert the model, too"""
    calibration_tokens: int = 4_096
    """tokens of it, at most"""
    trial_tokens: int = 2_048
    """tokens of the held-out text that those are measured on"""
    trial_k: tuple[int, ...] = (12, 8)
    """numbers of active experts at which they are measured"""
    recovery: Path | None = None
    """with --calibration: folder of prepared tokens to train every way to convert on, for what it recovers"""
    recovery_tokens: int = 50_000
    """tokens of that training"""
    out: Path = RECORDS
    """folder of the records, one for each dense model, of its folder's name"""

    @property
    def clock(self) -> Callable[[], float]:
        """One thread of a CPU counts the time in which it computes, so that other processes do not disturb it."""
        return time.thread_time if self.threads == 1 and self.device == "cpu" else time.perf_counter


@dataclass(frozen=True)
class Text:
    """Tokens of a text [B, T], and how many bytes they stand for. bos: the first token of every sequence, if the model wants one."""

    tokens_BT: Tensor
    bytes: int
    sha256: str
    bos: int | None = None

    @classmethod
    def read(cls, path: Path, folder: Path, tokens: int, context: int) -> Text:
        """At most this many tokens of a file by the tokenizer of a folder. UserError for a text shorter than a sequence."""
        from transformers import AutoTokenizer

        try:
            written = path.read_text("utf-8")[: 16 * tokens]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text ({error}): give a file of plain text") from None
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        whole = min(tokens, len(found["input_ids"])) // context * context
        if not whole:
            raise UserError(f"{path} has {len(found['input_ids'])} tokens, and a sequence has --context {context}: give a longer text")
        read = written[: found["offset_mapping"][whole - 1][1]].encode()
        first = (tokenizer("a")["input_ids"] or [None])[0]
        bos = first if first is not None and first in (tokenizer.bos_token_id, tokenizer.cls_token_id) else None
        ids_BT = torch.tensor(found["input_ids"][:whole]).view(-1, context)
        return cls(ids_BT, len(read), hashlib.sha256(read).hexdigest(), bos)

    def inputs(self) -> Iterator[Tensor]:
        """A few sequences at a time [B, T], with their first token."""
        for ids_BT in self.tokens_BT.split(ROWS):
            yield ids_BT if self.bos is None else F.pad(ids_BT, (1, 0), value=self.bos)

    def about(self, path: Path) -> dict[str, Any]:
        """For the record."""
        return {
            "name": path.name,
            "tokens": self.tokens_BT.numel(),
            "bytes": self.bytes,
            "context": self.tokens_BT.shape[1],
            "sha256": self.sha256,
            "bos": self.bos is not None,
        }


def open_model(folder: Path, device: str) -> nn.Module:
    """The model of a folder, in float32, for inference: a causal language model, or an encoder without a head. UserError for others."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    causal = any("CausalLM" in name for name in config.architectures or ())
    kind = AutoModelForCausalLM if causal else AutoModel
    return kind.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def weights_hash(folder: Path) -> str:
    """The sha256 of a folder's weights: of the file, or of the hashes of several."""
    found = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    if not found:
        raise UserError(f"{folder} holds no weights as safetensors: write them with save_pretrained")
    return next(iter(found.values())) if len(found) == 1 else checksum(found)


def experts_of(model: nn.Module) -> int:
    """Experts of the largest MoE layer; 0 for a dense model."""
    return max((layer.num_experts for _, layer in sd.moe_layers(model)), default=0)


def weights_used(model: nn.Module, k: int | None) -> int:
    """Parameters that a token is multiplied with: all but the tables that its rows are looked up in, with k experts active."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    looked_up = {id(table): table.numel() for table in tables if head is None or table is not head.weight}
    used = sum(parameter.numel() for parameter in model.parameters()) - sum(looked_up.values())
    for _, layer in sd.moe_layers(model):
        one = sum(parameter.numel() for parameter in layer.experts.parameters()) // layer.num_experts
        used -= (layer.num_experts - min(k or layer.num_experts, layer.num_experts)) * one
    return used


def outputs(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Logits of a language model [B, T, V], or hidden states of an encoder [B, T, D]."""
    ids_BT = ids_BT.to(model.device)
    return model(ids_BT, use_cache=False).logits if is_causal(model) else model(ids_BT).last_hidden_state


def is_causal(model: nn.Module) -> bool:
    """Return whether the model has a head for the next token."""
    return getattr(model, "get_output_embeddings", lambda: None)() is not None


@torch.no_grad()
def quality(model: nn.Module, text: Text) -> dict[str, float]:
    """Perplexity per token, and bits per byte, which models with other tokenizers have in common. Nothing for an encoder."""
    if not is_causal(model):
        return {}
    nats, count = 0.0, 0
    for ids_BT in text.inputs():
        logits_BTV = outputs(model, ids_BT)[:, :-1]
        targets_BT = ids_BT[:, 1:].to(logits_BTV.device)
        nats += F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), reduction="sum").item()
        count += targets_BT.numel()
    mean = nats / count
    bits = mean / math.log(2) * text.tokens_BT.numel() / text.bytes
    return {"perplexity": round(math.exp(min(mean, 700)), 4), "bits_per_byte": round(bits, 5)}


@torch.no_grad()
def difference(model: nn.Module, expected: Tensor, ids_BT: Tensor) -> float:
    """Relative error of the outputs, a norm over a norm."""
    return float(f"{((outputs(model, ids_BT) - expected).norm() / expected.norm()).item():.3e}")


def at(model: nn.Module, k: int | None) -> AbstractContextManager:
    """Context manager in which a converted model has this k."""
    return nullcontext() if k is None else sd.top_k(model, k)


@torch.no_grad()
def generator(model: nn.Module, k: int | None, ids_1T: Tensor, flags: SlimmableFlags) -> Callable[[], Any]:
    """A function that generates by transformers' own loop, or reads one sequence with an encoder."""
    if not is_causal(model):
        call = partial(outputs, model, ids_1T)
    else:
        call = partial(
            model.generate,
            ids_1T[:, : flags.prompt].to(model.device),
            max_new_tokens=flags.generated,
            min_new_tokens=flags.generated,
            do_sample=False,
            pad_token_id=0,
        )

    def run() -> None:
        with torch.no_grad(), at(model, k):
            call()

    return run


def measure(model: nn.Module, k: int | None, text: Text, probe: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """Weights used for a token, and quality, at one k. probe: outputs of the dense model, and the tokens that they are of."""
    with at(model, k):
        error = {} if probe is None else {"error": difference(model, *probe)}
        return {"weights": weights_used(model, k), **error, **quality(model, text)}


class Record:
    """The record of one dense model, written whenever a row has been found. Begun anew if anything that numbers depend on has changed."""

    def __init__(self, path: Path, identity: dict[str, Any], timing: dict[str, Any], env: dict[str, Any]):
        empty = {"timing": timing, "rows": [], "ablation": []}
        self.path, self.content = path, {"schema": SCHEMA, "benchmark": "slimmable", **identity, **empty}
        if path.exists():
            earlier = documents.read(path, Slimmable, "remove it, and measure again")
            if all(earlier[name] == identity[name] for name in identity):
                self.content = earlier
        if self.content["timing"] != timing:
            self.content["timing"] = timing
            for row in self.content["rows"]:
                for name in TIMES:
                    row.pop(name, None)
        self.content["environment"] = env

    def forget(self, key: dict[str, Any]) -> None:
        """Remove rows of other weights under the same name."""
        rows, names = self.content["rows"], ("stage", "name")
        same = [row for row in rows if all(row.get(name) == key.get(name) for name in names) and row["sha256"] != key["sha256"]]
        self.content["rows"] = [row for row in rows if row not in same]

    def row(self, part: str, key: dict[str, Any], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row with this key: what is there, or else what is found now, with the commit that it was found at."""
        rows = self.content[part]
        for row in rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        rows.append({**key, **find(), "commit": self.content["environment"]["commit"]})
        self.write()
        return rows[-1]

    def write(self) -> None:
        """Replace the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        documents.write(self.path, self.content)


def stages_of(flags: SlimmableFlags) -> dict[str, Path]:
    """Folders of the converted models by stage. UserError for anything else."""
    found = {}
    for given in flags.converted:
        stage, sign, folder = given.partition("=")
        if not (stage and sign and folder) or stage in (DENSE, OTHER) or stage in found:
            raise UserError(f"{given!r} is not one of several STAGE=FOLDER with names of their own, such as fitted=out/smollm2")
        found[stage] = Path(folder)
    return found


def identity_of(flags: SlimmableFlags, text: Text) -> dict[str, Any]:
    """Everything that the numbers of a record depend on: if it changes, they are not kept."""
    origin = None if flags.origin is None else {"name": flags.origin.name, "sha256": sha256(flags.origin)}
    model = {"name": flags.dense.resolve().name, "package": flags.package, "origin": origin, "sha256": weights_hash(flags.dense)}
    return {"model": model, "text": text.about(flags.text)}


def timing_of(flags: SlimmableFlags) -> dict[str, Any]:
    """Settings of the measurement of times: if they change, earlier times are not kept."""
    names = ("prompt", "generated", "rounds", "threads", "device")
    return {**{name: getattr(flags, name) for name in names}, "clock": flags.clock.__name__}


def contestants(flags: SlimmableFlags) -> Iterator[tuple[dict[str, Any], Path]]:
    """Keys of the rows, with their folders: the dense model, those of other sizes, and the stages of the conversion. UserError for a folder
    that is not what it is given as.
    """
    named = [({"stage": OTHER, "name": folder.resolve().name}, folder) for folder in flags.others]
    named += [({"stage": stage}, folder) for stage, folder in stages_of(flags).items()]
    for key, folder in [({"stage": DENSE}, flags.dense), *named]:
        kind = read_object(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
        if kind is None:
            inner = folder / "model"  # of a run that has recovered it
            remedy = inner if (inner / "config.json").is_file() else "one with config.json, model.safetensors and a tokenizer"
            raise UserError(f"{folder} is no folder of transformers: give {remedy}")
        if (kind == NAME) != (key["stage"] not in (DENSE, OTHER)):
            raise UserError(f"{folder}: dense models are given by --dense and --others, converted ones as STAGE=FOLDER")
        yield {**key, "sha256": weights_hash(folder)}, folder


def opened(flags: SlimmableFlags) -> tuple[Text, Record]:
    """The held-out text, and the record of the dense model, as far as it is."""
    text = Text.read(flags.text, flags.dense, flags.tokens, flags.context)
    path = flags.out / f"{flags.dense.resolve().name}.json"
    return text, Record(path, identity_of(flags, text), timing_of(flags), environment(flags.device, []))


def run(flags: SlimmableFlags) -> None:
    """Measures everything that the record does not have. UserError for flags or folders that cannot be measured."""
    if flags.dense is None or flags.text is None:
        raise UserError("--dense FOLDER and --text FILE are needed: the model, and text that it has not been fitted to")
    torch.set_num_threads(flags.threads)
    compared = list(contestants(flags))
    text, record = opened(flags)
    probe_BT = next(iter(text.inputs()))[:, : min(128, flags.context)]
    dense = open_model(flags.dense, flags.device)
    with torch.no_grad():
        expected = outputs(dense, probe_BT)
    timed, rows = {}, {}
    for key, folder in compared:
        record.forget(key)
        model = dense if key["stage"] == DENSE else open_model(folder, flags.device)
        E, own = experts_of(model), text if key["stage"] != OTHER else Text.read(flags.text, folder, flags.tokens, flags.context)
        for k in sorted({k for k in flags.k if k < E} | {E}) if E else [None]:
            find = partial(measure, model, k, own, None if key["stage"] == OTHER else (expected, probe_BT))
            row = record.row("rows", {**key, "k": k, "experts": E}, find)
            name = f"{key['stage']} {key.get('name', '')} {k}"
            timed[name], rows[name] = generator(model, k, own.tokens_BT[:1], flags), row
            print(f"{name}: {row.get('perplexity')}", flush=True)
    if flags.generated and not all("ratio" in row for row in rows.values()):
        baseline = next(iter(timed))
        times = summarise(interleave(timed, flags.rounds, flags.device, flags.clock), baseline)
        for name, row in rows.items():
            row |= times[name]
        record.write()
    print(f"{quality_table(record.content)}\nmeasured {flags.dense}: {record.path}")
