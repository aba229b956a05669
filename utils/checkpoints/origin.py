"""The checkpoint that training starts from: its weights, its flags and its history. Imports no torch.

A run folder of train.py (its best weights), one of its checkpoints/step-*, a folder of surgery.py, of smoe_dropout.save_pretrained or of
transformers, or weights only: a folder of smoe_dropout.save_model, whose sizes must be given as flags.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from smoe_dropout.config import SMoEConfig, read_configs
from smoe_dropout.files import read_object
from smoe_dropout.options import ConfigError
from smoe_dropout.registry import METHODS, load
from utils import documents
from utils.checkpoints import run_files, schema_1
from utils.checkpoints.manifest import MANIFEST, REMEDY, WEIGHTS, name_of
from utils.checkpoints.run_files import MODEL, RESULT, SURGERY, config_sha256, read_config, read_result
from utils.checkpoints.schema_1 import TRAINED
from utils.data.tokens import FILE as TOKENIZER_FILE
from utils.data.tokens import load_tokens
from utils.documents import Damaged
from utils.errors import UserError
from utils.flags.declare import flags_from
from utils.flags.derive import CONFIG_FIELDS
from utils.flags.fields import Flags
from utils.flags.models import MODELS, TRANSFORMERS_FIELDS

EXPERTS, TRANSFORMERS_WEIGHTS = "smoe_config.json", "experts.safetensors"
LIBRARY = SMoEConfig.__module__.partition(".")[0]


@dataclass(frozen=True)
class Source:
    """A checkpoint.

    path: as given. weights: the file. flags: those of train.py that made it, as far as they are known. trained: what it was trained on and
    for how long, as values. operations: what was done to the weights afterwards, surgery and training, in order. from_transformers:
    smoe_dropout.from_pretrained reads it. surgery: what surgery.py measured, where the weights went through it. config_sha256: of the run
    that the checkpoint belongs to. weights_sha256: of the weights that the run's record names, where it says so.
    """

    path: Path
    weights: Path
    flags: dict[str, Any]
    trained: dict[str, Any]
    operations: tuple[dict[str, Any], ...] = ()
    from_transformers: bool = False
    surgery: dict[str, Any] | None = None
    config_sha256: str | None = None
    weights_sha256: str | None = None

    @property
    def made(self) -> Flags:
        """The flags of the run that made it."""
        return flags_from(self.flags, Flags)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the weights."""
        found, folder = documents.content_of(self.weights), self.weights.parent
        if self.config_sha256 and documents.read(folder / MANIFEST, dict[str, documents.Content], REMEDY).get(self.weights.name) != found:
            raise Damaged(self.weights, f"is damaged: its size or sha256 differs from {MANIFEST}", REMEDY)
        if self.weights_sha256 not in (None, found["sha256"]):
            raise Damaged(self.weights, f"holds other weights than those of the run's {RESULT}", REMEDY)
        return found["sha256"]

    @property
    def summary(self) -> str:
        """A few words for the console."""
        if "folder" in self.trained:
            return self.trained["folder"]
        where = f"step {at:,}" if (at := self.trained.get("checkpoint")) else f"{self.trained['steps']:,} steps"
        done = [f"{one['steps']:,} steps" if one["method"] == "train" and "steps" in one else one["method"] for one in self.operations]
        return ", ".join([self.trained["dataset"].get("title") or self.trained["dataset"]["name"], where, *done])


def open_source(path: Path) -> Source:
    """UserError for a folder that does not exist, holds no checkpoint, or belongs to an unfinished run."""
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise UserError(f"the checkpoint {path} {kind}: give the folder of a finished run of train.py, or of weights")
    if (path / TRANSFORMERS_WEIGHTS).exists() or "model_type" in _json(path / "config.json"):
        return _transformers(path)
    for name, opener in ((SURGERY, operation), ("config.json", _run), ("state.json", _step), (EXPERTS, _weights), (WEIGHTS, _weights)):
        if (path / name).exists():
            return opener(path)
    raise UserError(f"{path} holds no checkpoint: it has neither config.json of a run, nor {WEIGHTS}, nor {TRANSFORMERS_WEIGHTS}")


def open_run(path: Path) -> Source:
    """`open_source`, refusing weights without the flags of the run that made them."""
    source = open_source(path)
    if "preset" not in source.flags:
        raise UserError(f"{source.path} holds weights only: give the folder of the run that made them")
    return source


def _run(path: Path) -> Source:
    """The weights whose test is in the run's record."""
    flags = _flags_of_run(path)
    record = read_result(path, config_sha256(flags), documents.note_unverified)
    if record is None:
        raise UserError(f"the run {path} has not ended, it has no {RESULT}: finish it, or give one of its folders checkpoints/step-*")
    if MODELS[flags["model"]].from_folder:
        start, training = (
            record["pretrained"],
            {"method": "train", "steps": flags["max_step"], **({"taught": True} if flags["teacher"] else {})},
        )
        trained = {name: start[name] for name in ("folder", "experts") if name in start}
        return replace(_host(path / MODEL), path=path, trained=trained, operations=(*start["operations"], training))
    return _of_run(path, path / "checkpoints" / name_of(record["best_step"]), flags, record)


def operation(path: Path) -> Source:
    """A folder of surgery.py. UserError if it is incomplete."""
    flags, stored, folder = _flags_of_run(path), read_surgery(path), path / "checkpoints" / name_of(0)
    trained, operations = stored.pop("trained"), tuple(stored.pop("operations"))
    return Source(path, _weights_of(folder), flags, trained, operations, surgery=stored, config_sha256=config_sha256(flags))


def read_surgery(path: Path) -> dict[str, Any]:
    """The content of a folder's surgery.json, also of version 0.1. UserError if it lacks what was done."""
    stored = _translated(schema_1.surgery, run_files.read_surgery(path, config_sha256(read_config(path))), path / SURGERY)
    if not stored.keys() >= {"trained", "operations", "source_sha256"}:
        raise UserError(f"{path / SURGERY} is damaged: make it again in another folder")
    return stored


def _translated(translate: Callable[[dict[str, Any]], dict[str, Any]], old: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return translate(old)
    except (LookupError, TypeError, AttributeError, ValueError):
        raise Damaged(path, "is damaged: it is not what version 0.1 wrote", run_files.remedy_for(path.parent)) from None


def _step(path: Path) -> Source:
    run = path.resolve().parent.parent
    if not (run / "config.json").exists():
        return _weights(path)
    if (run / SURGERY).exists():
        return operation(run)
    step, flags = path.resolve().name.rpartition("-")[2], _flags_of_run(run)
    if MODELS[flags["model"]].from_folder:
        raise UserError(f"{path} is a checkpoint of a model of transformers: give its run, {run}, which holds the model once it has ended")
    if not step.isdecimal():
        raise UserError(f"{path} is no checkpoint of the run {run}: give one of its folders checkpoints/step-*")
    return _of_run(path, path, flags, read_result(run, config_sha256(flags), documents.note_unverified) or {}, {"checkpoint": int(step)})


def _flags_of_run(run: Path) -> dict[str, Any]:
    config = read_config(run, documents.note_unverified)
    if "task" in config:
        raise UserError(f"{run} is a fine-tuned run of {config['task']}: give the pre-trained run it started from")
    return config


def _of_run(path: Path, folder: Path, flags: dict[str, Any], record: dict[str, Any], at: dict[str, int] | None = None) -> Source:
    """A run of train.py. record: empty for an unfinished run. at: the checkpoint, if it is not the one the record describes."""
    steps = {"steps": flags["max_step"]} | (at or {})
    start = _translated(schema_1.pretrained, record.get("pretrained", {}), path / RESULT)
    whose = {"config_sha256": config_sha256(flags), "weights_sha256": None if at else record.get("weights_sha256")}
    if start:
        more = {"taught": True} if flags["teacher"] else {}
        trained = {name: start[name] for name in TRAINED if name in start}
        operations = (*start.get("operations", ()), {"method": "train", **steps, **more})
        return Source(path, _weights_of(folder), flags, trained, operations, surgery=start.get("surgery"), **whose)
    known = record.get("dataset", {"name": flags["dataset"], "fingerprint": flags.get("data_fingerprint")})
    dataset = {name: known[name] for name in ("name", "title", "fingerprint") if name in known}
    return Source(path, _weights_of(folder), flags, {"dataset": dataset, **steps}, **whose)


def _weights_of(folder: Path) -> Path:
    """The weights of a checkpoint."""
    if not (folder / WEIGHTS).exists() or not (folder / MANIFEST).exists():
        raise UserError(f"the checkpoint {folder} is missing or incomplete: give another of {folder.parent}, or train again")
    return folder / WEIGHTS


def _weights(path: Path) -> Source:
    if not (path / WEIGHTS).exists():
        raise UserError(f"{path / WEIGHTS} is missing: the folder is incomplete")
    flags: dict[str, Any] = {}
    if (path / EXPERTS).exists():
        experts, *more = read_configs(path / EXPERTS)
        if more:
            raise UserError(f"{path} holds a model that was converted more than once, which cannot be trained here: give another")
        flags = flags_of_experts(experts)
    return Source(path, path / WEIGHTS, flags, {"folder": path.name})


def flags_of_experts(experts: SMoEConfig) -> dict[str, Any]:
    """The flags of train.py that correspond to a configuration of the library."""
    frozen = experts.router == "random" if experts.freeze_router is None else experts.freeze_router  # None: the default of the router
    return {name: getattr(experts, field) for name, field in CONFIG_FIELDS.items()} | {
        "moe": True,
        "freeze_gate": frozen,
        "moe_index": None if experts.layers is None else ",".join(map(str, experts.layers)),
        "method_options": ",".join(f"{name}={value}" for name, value in experts.options.items()) or None,
        **({"method": experts.method} if experts.method in METHODS else {}),
        "moe_experts_by_layer": ",".join(map(str, experts.experts_by_layer)) if experts.experts_by_layer else None,
        **({"d_inner": experts.d_expert} if experts.d_expert else {}),
    }


def _transformers(path: Path) -> Source:
    """A folder of smoe_dropout.save_pretrained or of transformers: sizes from the host's settings."""
    config = _json(path / "config.json")
    if config.get("model_type") != LIBRARY:
        return _host(path)
    try:
        host, kind, experts = config["host"], config["host_model_type"], SMoEConfig.stored(config[LIBRARY])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / 'config.json'} is damaged: {error}") from None
    classes = [str(name) for name in config.get("architectures") or [kind]]
    known = [name for name, model in MODELS.items() if "pieces" in model.reads]
    if kind not in known or not classes[0].endswith("ForMaskedLM"):
        return _host(path)
    sizes = {name: host.get(field, default) for name, (field, default) in TRANSFORMERS_FIELDS.items()}
    sizes |= {"model": kind, "tgt_len": host.get("max_position_embeddings", 512) - MODELS[kind].first_position}
    weights = next(path / name for name in (TRANSFORMERS_WEIGHTS, WEIGHTS) if (path / name).exists() or name == WEIGHTS)
    return Source(path, weights, sizes | flags_of_experts(experts), {"folder": path.name}, from_transformers=True)


def _host(path: Path) -> Source:
    """A folder of any model of transformers, dense or converted, for the model that is built from it."""
    from smoe_dropout.hf.described import placed_conversions
    from smoe_dropout.hf.loading import read_config as read_host  # imports transformers

    try:
        config, _ = read_host(path, {})
        conversions = placed_conversions(config)
        vocabulary = {"vocabulary_sha256": load_tokens(path)[1].sha256} if (path / TOKENIZER_FILE).exists() else {}
    except ConfigError as error:
        raise UserError(f"{path} holds no model that can be built: {' '.join(str(error).split())}") from None
    if len(conversions) > 1 or any(conversion.module for conversion in conversions):
        raise UserError(f"{path} holds a model that was converted in parts or more than once, which cannot be trained here: give another")
    if not (path / WEIGHTS).exists():
        raise UserError(f"{path / WEIGHTS} is missing: save the model again, in one file (max_shard_size) of safetensors")
    text = config.get_text_config()
    width = next((size for name in ("intermediate_size", "n_inner", "ffn_dim") if isinstance(size := getattr(text, name, None), int)), None)
    sizes = {name: getattr(text, TRANSFORMERS_FIELDS[name][0]) for name in ("n_layer", "d_model", "n_head")}
    sizes |= {name: getattr(text, TRANSFORMERS_FIELDS[name][0], 0.0) for name in ("dropout", "dropatt")}
    width, experts = width or 4 * sizes["d_model"], conversions[0].config if conversions else None
    made = flags_of_experts(experts) if experts else {"moe": False}
    if experts and "d_inner" not in made:
        made["d_inner"] = width if experts.expert_init == "copy" else -(-width // experts.num_experts)
    sizes["d_ff"] = made["d_inner"] * experts.num_experts if experts else width
    model = next(name for name, model in MODELS.items() if model.from_folder)
    positions = {"max_length": most} if (most := getattr(text, "max_position_embeddings", None)) else {}
    found = {"model": model, "start_from": str(path), **sizes, **made, **positions, **vocabulary}
    usual = asdict(SMoEConfig())
    own = {"experts": {name: value for name, value in asdict(experts).items() if value != usual[name]}} if experts else {}
    return Source(path, path / WEIGHTS, found, {"folder": path.resolve().name, **own}, from_transformers=True)


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        return read_object(path)
    except ConfigError:
        return {}


def kind_of(source: Source) -> str:
    """The name of a checkpoint's method in refusals."""
    name = source.flags.get("method")
    sparse = load(METHODS, "method", name).sparse if name else source.flags.get("moe", False)
    return f"--method {name or 'custom'}, {'with' if sparse else 'without'} experts"
