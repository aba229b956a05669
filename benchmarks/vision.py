"""Vision by plug-in: a ViT of transformers, converted by the library, trained on small images, tested at every k, clean and corrupted.

    python -m benchmarks.vision --method smoe --seed 1 --out runs/vision/digits/smoe-seed1

Without --images the images are scikit-learn's digits, 1,797 of 8 x 8. A finished run is kept.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

import smoe_dropout as sd
from benchmarks.images import CORRUPTIONS, Images, corrupted
from benchmarks.measure import SCHEMA, Device, environment
from smoe_dropout.methods.base import Method, cross_entropy
from smoe_dropout.registry import METHODS, load, unknown
from utils import documents
from utils.errors import UserError, refuse_unwritable, run_main

RECORD = "result.json"
WARM_UP = 0.1  # share of the steps
ROWS = 256  # images in a pass of a test
MODEL = ("image_size", "patch_size", "layers", "width", "hidden", "heads")  # flags of the dense model
TRAINING = ("steps", "batch", "lr", "weight_decay")


@dataclass(frozen=True)
class VisionFlags:
    """A small vision transformer with experts: accuracy at every k, on clean and on corrupted images."""

    method: str = "smoe_dropout"
    """a method of the library that is trained by cross-entropy"""
    router: str | None = None
    """another router than the method's"""
    output_scale: Literal["mean", "dense"] = "mean"
    """with "dense" the output is times E"""
    options: tuple[str, ...] = ()
    """options of method and router, such as mu=0.9"""
    seed: int = 1
    """of weights, order of the images, and k where it is drawn"""
    images: Path | None = None
    """folder of images, in it a folder for each class; default: scikit-learn's digits"""
    image_size: int = 8
    """side that images are resized to"""
    patch_size: int = 2
    """side of a patch, one token"""
    held_out: float = 1 / 3
    """share of the images that is tested on"""
    split_seed: int = 0
    """of the split and of the corruptions, the same in all runs that are compared"""
    layers: int = 4
    """blocks"""
    width: int = 64
    """of the tokens"""
    hidden: int = 256
    """hidden units of a feed-forward network, all experts together"""
    heads: int = 4
    """of attention"""
    experts: int = 16
    """E, in every block"""
    steps: int = 1000
    """of training"""
    batch: int = 64
    """images in a step"""
    lr: float = 1e-3
    """largest learning rate, after the warm-up"""
    weight_decay: float = 0.05
    """of weights, not of biases, norms and routers"""
    k: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16)
    """numbers of active experts tested, up to E"""
    threads: int = 1
    """torch's threads"""
    device: Device = "cpu"
    """where to compute"""
    out: Path = Path("runs/vision/run")
    """folder of the run"""
    dry_run: bool = False
    """check the flags and read the images, and train nothing"""


def check(flags: VisionFlags) -> None:
    """UserError for sizes that make no model or no training."""
    counts = ("image_size", "patch_size", "layers", "width", "hidden", "heads", "experts", "steps", "batch", "threads")
    if wrong := [name for name in counts if getattr(flags, name) < 1]:
        raise UserError(f"--{wrong[0]} {getattr(flags, wrong[0])} must be at least 1")
    for whole, part in (("image_size", "patch_size"), ("width", "heads")):
        if getattr(flags, whole) % getattr(flags, part):
            raise UserError(f"--{whole} {getattr(flags, whole)} must be a multiple of --{part} {getattr(flags, part)}")
    if not any(1 <= k <= flags.experts for k in flags.k) or min(flags.k) < 1:
        raise UserError(f"--k {' '.join(map(str, flags.k))} must be numbers from 1 to --experts {flags.experts}")


def by_name(flags: VisionFlags) -> tuple[Method, sd.SMoEConfig | None, sd.TopKSchedule | None]:
    """The method, and for a sparse one its experts and its schedule of k. UserError for a method that only train.py can train."""
    if flags.method not in METHODS:
        raise UserError(f"--method: {unknown('method', flags.method, METHODS)}")
    method: Method = load(METHODS, "method", flags.method)
    if method.objective is not cross_entropy or method.convert is not None:
        raise UserError(f"--method {flags.method} has an objective or dense layers of its own, for train.py only: choose another method")
    if not method.sparse:
        if flags.router or flags.options or flags.output_scale != "mean":
            raise UserError(f"--method {flags.method} has no experts: leave --router, --options and --output_scale out")
        return method, None, None
    half = max(1, flags.experts // 2)
    config = sd.SMoEConfig(
        num_experts=flags.experts,
        top_k=half,
        router=flags.router or method.flags["gate_name"],
        freeze_router=None if flags.router else method.flags["freeze_gate"],
        output_scale=flags.output_scale,
        method=method.name if method.layer else None,
        options=dict(option.partition("=")[::2] for option in flags.options),
    )
    most = flags.experts if method.flags["dynamic_moe"] else half
    return method, config, sd.TopKSchedule(method.flags.get("dynamic_moe_mode", "constant"), half, most, flags.steps, flags.seed)


def build(flags: VisionFlags, method: Method, config: sd.SMoEConfig | None, data: Images) -> nn.Module:
    """The model with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(flags.seed)
    sizes = {"hidden_size": flags.width, "num_hidden_layers": flags.layers, "num_attention_heads": flags.heads}
    sizes |= {"intermediate_size": flags.hidden, "image_size": flags.image_size, "patch_size": flags.patch_size}
    sizes |= {"num_channels": data.pixels_NCHW.shape[1], "num_labels": data.classes}
    dropout = {"hidden_dropout_prob": method.flags.get("dropout", 0.0), "attention_probs_dropout_prob": method.flags.get("dropatt", 0.0)}
    model = ViTForImageClassification(
        ViTConfig(**sizes, **dropout, attn_implementation="eager")
    )  # with probabilities, which a method needs
    return (model if config is None else sd.moefy(model, config)).to(flags.device)


def train(model: nn.Module, data: Images, schedule: sd.TopKSchedule | None, flags: VisionFlags) -> None:
    """Trains the model, with k by the schedule."""
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(sd.parameter_groups(model, flags.weight_decay), lr=flags.lr)
    rate = get_cosine_schedule_with_warmup(optimizer, round(WARM_UP * flags.steps), flags.steps)
    draw, count = torch.Generator().manual_seed(flags.seed), len(data.labels_N)
    order = torch.cat([torch.randperm(count, generator=draw) for _ in range(math.ceil(flags.steps * flags.batch / count))])
    model.train()
    for step in range(flags.steps):
        if schedule is not None:
            sd.set_top_k(model, schedule(step))
        sd.set_progress(model, step, flags.steps)
        chosen_B = order[step * flags.batch : (step + 1) * flags.batch]
        labels_B = data.labels_N[chosen_B].to(flags.device)
        loss = model(inputs(data.pixels_NCHW[chosen_B], flags), labels=labels_B).loss  # includes the experts' auxiliary losses
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


def inputs(pixels_NCHW: Tensor, flags: VisionFlags) -> Tensor:
    """Images as the model reads them, from -1 to 1."""
    return (2 * pixels_NCHW - 1).to(flags.device)


@torch.no_grad()
def accuracy(model: nn.Module, pixels_NCHW: Tensor, labels_N: Tensor, flags: VisionFlags) -> float:
    """Images that get the right class, in percent."""
    found_N = torch.cat([model(inputs(part_NCHW, flags)).logits.argmax(-1).cpu() for part_NCHW in pixels_NCHW.split(ROWS)])
    return round(100 * (found_N == labels_N).double().mean().item(), 3)


def tested(model: nn.Module, data: Images, test: Images, flags: VisionFlags) -> list[dict[str, Any]]:
    """Accuracy at each k, or once for a dense model, on the training images, the test images, and these corrupted."""
    damaged = {
        name: [corrupted(test.pixels_NCHW, name, severity, flags.split_seed) for severity in severities]
        for name, (_, severities) in CORRUPTIONS.items()
    }
    model.eval()
    rows = []
    for k in sorted({k for k in flags.k if k <= flags.experts}) if sd.moe_layers(model) else [None]:
        with sd.top_k(model, k) if k else nullcontext():
            row = {"k": k, "train": accuracy(model, data.pixels_NCHW, data.labels_N, flags)}
            row["clean"] = accuracy(model, test.pixels_NCHW, test.labels_N, flags)
            row["corrupted"] = {name: [accuracy(model, one, test.labels_N, flags) for one in several] for name, several in damaged.items()}
        rows.append(row)
    return rows


def run(flags: VisionFlags) -> None:
    """Trains and tests a model, and writes its record; a finished run is kept. UserError for a folder with another run."""
    check(flags)
    method, config, schedule = by_name(flags)
    refuse_unwritable("--out", flags.out)
    torch.set_num_threads(flags.threads)
    images = Images.read(flags.images, flags.image_size)
    data, test = images.split(flags.held_out, flags.split_seed)
    about: dict[str, Any] = {"schema": SCHEMA, "benchmark": "vision", "method": flags.method, "router": flags.router}
    about |= {"output_scale": flags.output_scale, "options": config.options if config else {}, "seed": flags.seed}
    about["data"] = {"name": images.name, "sha256": images.sha256, "classes": images.classes, "split_seed": flags.split_seed}
    about["data"] |= {"train": len(data.labels_N), "test": len(test.labels_N)}
    about["data"]["corruptions"] = {name: severities for name, (_, severities) in CORRUPTIONS.items()}
    about["model"] = {"architecture": "ViTForImageClassification", **{name: getattr(flags, name) for name in MODEL}}
    about["experts"] = asdict(config) if config else None
    about["training"] = {name: getattr(flags, name) for name in TRAINING}
    about["training"] |= {"optimiser": "AdamW", "warm_up": WARM_UP, "decay": "cosine", "schedule": asdict(schedule) if schedule else None}
    about, path = documents.finite(about), flags.out / RECORD
    if path.exists():
        remedy = "remove it, or give another --out"
        found = documents.read(path, dict, remedy)
        if other := [name for name, value in about.items() if found.get(name) != value]:
            raise UserError(f"{path} is of another run, with other {other[0]}: {remedy}")
        print(f"{path} is finished")
        return
    if flags.dry_run:
        return
    model = build(flags, method, config, images)
    begin = time.perf_counter()
    train(model, data, schedule, flags)
    about["seconds"] = round(time.perf_counter() - begin, 3)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    about["parameters"] = {"total": sum(size for size, _ in sizes), "trained": sum(size for size, trained in sizes if trained)}
    about["rows"] = tested(model, data, test, flags)
    flags.out.mkdir(parents=True, exist_ok=True)
    documents.write(path, about | {"environment": environment(flags.device, [])})
    print(f"{path}: {about['rows'][-1]['clean']:.1f} % of the clean images, {about['seconds']:.0f} s")


if __name__ == "__main__":
    run_main(lambda: run(tyro.cli(VisionFlags, prog="python -m benchmarks.vision", use_underscores=True)))
