"""Every flag of train.py, finetune.py, surgery.py, generate.py and convert.py, declared once. Imports no torch.

A new flag is one line here, and the code that uses it. Its roles say how else it is used; `names(role=...)` lists the flags of a role:

run          where, on what and how long to train: not part of the identity of method or preset
model        defines the meaning of the dense model's weights: always taken from a checkpoint
experts      the same for the weights of the experts
training     how a checkpoint was trained: the default when it is trained further or fine-tuned
continued    the same, for --start_from only
start        how training starts from a checkpoint; without meaning for the trained model
surgery      changed by surgery.py
teacher      must be equal for a teacher and its student
taught       recorded with a teacher
derived      derived from another flag (`follows`) unless given
unstored     not part of config.json: changes no number
replaceable  may differ when a run is resumed: the sha256 of the weights identifies them
variant      recorded beside the method, not beside the preset
evaluation   may be given with --eval_only: changes neither the model nor what it is tested on
verbatim     may be empty, or bytes that are no text
option       surgery.py: an option of the operation
calibration  surgery.py: concerns the calibration data
"""

from collections import ChainMap
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import PurePath
from typing import get_args

from smoe_dropout.config import GateWeight, OutputScale
from smoe_dropout.registry import BACKENDS, CUTS, METHODS, ROUTER_ALIASES, ROUTERS, SURGERIES
from smoe_dropout.schedule import SCHEDULES
from utils.data.attack import ATTACKS
from utils.data.rows import TASKS, kind_of
from utils.flags.declare import ABSENT, flag, groups, same_flag, specs
from utils.flags.models import MODELS
from utils.flags.presets import PRESET_NAMES

# those of mem_transformer, which needs torch
DROPOUT_PLACES = ("embedding", "attention", "hidden", "output")
COMPRESS = "compress"  # the operation of surgery.py that is not in the library's registry
ROUTER_NORM = "router_norm"  # the score that needs no calibration data
TRAINED = ("experts", "adapters")
SELF = "self"  # the model itself as its teacher
EARLIER = "earlier"  # defaults of runs made before --defaults existed
SCORES = ("usage", "gate_weight", ROUTER_NORM)
COMPARE, ALIGN = ("all", "sample"), ("first", "leader")  # options of merging
AVERAGING = ("merge", "average", "drop")  # operations that keep a number of experts on average over the layers, the others in every layer
EQUAL = tuple(name for name in SURGERIES if name not in AVERAGING)
CORRECTIONS = ("none", "norm", "mean")

group = dataclass(frozen=True, kw_only=True)
folder = partial(flag, metavar="DIR")
expert_flag = partial(flag, needs="moe")


@group
class RunFlags:
    title = "run"

    method: str | None = flag(None, "training method, which sets flags. Default: the one the flags match", "run experts", choices=METHODS)
    model: str = flag("transformer_xl", "architecture; hf: that of the --start_from folder", "run model teacher", choices=MODELS)
    preset: str = flag("paper", "sizes and lengths", "run", choices=PRESET_NAMES)
    work_dir: str | None = folder(
        None, "folder of the run; rerun to resume. Default: runs/<preset>/<dataset>/<run_name>-seed<seed>", "run unstored evaluation"
    )
    run_name: str | None = flag(None, "name in the default --work_dir. Default: the method's", "run unstored")
    method_options: str | None = flag(
        None, "options of method and router, such as alpha=5,inference=token; a wrong one lists all", "training verbatim"
    )
    defaults: str = flag(
        "authors", "options not given: those of authors' code, or earlier runs", "run experts", choices=("authors", EARLIER), since=EARLIER
    )
    seed: int = flag(1111, "random seed: initialisation, router, dropout; for word pieces also order and masks", "run", low=0)
    yes: bool = flag(False, "skip the check that refuses runs of many hours on a CPU", "run unstored evaluation")
    repair: bool = flag(False, "resume a damaged run from what is intact; the record lists what was lost", "run unstored")
    eval_only: bool = flag(False, "evaluate the best weights of --work_dir again, with the run's own flags", "run unstored evaluation")
    k: str | None = flag(None, "with --eval_only: numbers of active experts, such as 1,2,4", "run unstored evaluation")


@group
class StartFlags:
    title = "initialisation"

    start_from: str | None = folder(
        None, "start from the weights of a run, surgery.py or transformers; they set the model's flags", "run start replaceable", since=None
    )
    settings_from: str | None = folder(None, "take flags that are not given from a finished run; weights are random", "run unstored")
    teacher: str | None = folder(
        None, "finished run to distil from, at k = E; hf: a folder, or self", "run start replaceable", needs="start_from", since=None
    )
    teacher_weight: float = flag(0.2, "weight of the distillation loss", "run start taught", above=0, needs="teacher", since=0.2)
    teacher_temperature: float = flag(2.0, "distillation temperature", "run start taught", above=0, needs="teacher", since=2.0)
    teacher_squared: bool = flag(
        False, "multiply by the temperature squared, as --teacher self always does", "run start taught", needs="teacher", since=True
    )


@group
class DataFlags:
    title = "data"

    data: str | None = folder(
        None, "folder made by data/prepare.py or data/prepare_pieces.py. Default: data/<dataset>", "run continued evaluation"
    )
    dataset: str = flag("enwik8", "name of the data set. Default: the preset's, or the name of the --data folder", "run continued")
    batch_size: int = flag(22, "sequences per step, over all processes", low=1)
    batch_chunk: int = flag(1, "compute a batch in this many parts, to save memory", "run", low=1)
    tgt_len: int = flag(512, "positions per training segment or sequence", "model teacher", low=1)
    varlen: bool = flag(False, "draw the length of every training segment, around tgt_len or half of it", "continued", since=False)
    mem_len: int = flag(512, "positions of memory in training", "model teacher", low=0)
    eval_tgt_len: int = flag(128, "positions per evaluation segment; its memory is mem_len + tgt_len - eval_tgt_len", "model", low=1)
    eval_batch_size: int = flag(10, "sequences per evaluation batch", "run", low=1)
    mask_rate: float = flag(0.15, "share of pieces masked for prediction", "model", above=0, below=1)
    max_eval_steps: int = flag(-1, "batches per validation during training (-1: all)", "run", low=1, special=-1)
    max_test_steps: int = flag(
        -1, "batches of the final test (-1: all); the record says how much was read", "run evaluation", low=1, special=-1
    )
    attack: str | None = flag(
        None, "test also with words swapped for <unk>, or random symbols", "run evaluation", choices=ATTACKS, since=None
    )
    attack_rate: float = flag(0.025, "share of symbols replaced", "run evaluation", above=0, high=1, needs="attack", since=0.025)


@group
class ModelFlags:
    title = "model"

    n_layer: int = flag(4, "layers", "model teacher", low=1, high=10_000)
    n_head: int = flag(8, "attention heads", "model", low=1)
    d_head: int = flag(64, "width of one head", "model", low=1)
    d_model: int = flag(256, "model width", "model teacher", low=1)
    d_ff: int | None = flag(None, "hidden width of the feed-forward layer; experts share it", "model", low=1, follows="moe_num_expert")
    d_inner: int | None = flag(None, "official: the same, but with --moe that of one expert", "model", low=1, follows="d_ff")
    dropout: float = flag(0.1, "dropout rate", "training", low=0, below=1)
    dropatt: float = flag(0.0, "dropout rate of attention probabilities", "training", low=0, below=1)
    dropout_only: str | None = flag(
        None, "the one place where --dropout acts. Default: all", "training", choices=DROPOUT_PLACES, needs="dropout", since=None
    )
    pre_lnorm: bool = flag(False, "LayerNorm before each sublayer instead of after it", "model")
    attn_type: int = flag(0, "relative positions: 0 official, 1 learned; absolute: 2 sines, 3 learned", "model", low=0, high=3, since=0)
    same_length: bool = flag(False, "let every position attend equally far back", "model")
    clamp_len: int = flag(-1, "largest distance with its own position embedding (-1: no limit)", "model", low=1, special=-1)
    not_tied: bool = flag(False, "separate input and output embeddings", "model")
    adaptive: bool = flag(False, "texts of tokens: adaptive embedding and softmax, by clusters of frequency", "model", since=False)
    cutoffs: str = flag("20000,40000,200000", "where each later cluster begins", "model", needs="adaptive", since="20000,40000,200000")
    div_val: int = flag(1, "each cluster's width is the one before divided by this", "model", low=1, needs="adaptive", since=1)
    untied_projections: bool = flag(False, "separate input and output projections of clusters", "model", needs="adaptive", since=False)
    sample_softmax: int = flag(-1, "texts of tokens: train against this many sampled ones (-1: all)", "model", low=1, special=-1, since=-1)
    init_std: float = flag(0.02, "standard deviation of the initial weights", "model", above=0)
    dense_drop: bool = flag(False, "official: drop whole blocks of hidden units in dense feed-forward layers", "experts")


@group
class ExpertFlags:
    title = "experts"

    moe: bool = flag(False, "replace feed-forward layers by mixtures of experts", "experts")
    moe_num_expert: int = flag(16, "experts per layer, E", "experts surgery", low=1)
    moe_experts_by_layer: str | None = expert_flag(None, "experts of each MoE layer, such as 8,6,10,8", "experts surgery", since=None)
    moe_expert_rank: int | None = expert_flag(None, "rank of compressed experts U V + S", "experts surgery", low=1, since=None)
    moe_sparse_share: float = expert_flag(1.0, "share of the hidden units in S", "experts surgery", above=0, high=1, since=1.0)
    moe_prune_to: float | None = expert_flag(
        None, "with --start_from: share of the hidden units to prune S to", "start continued", above=0, high=1, since=None
    )
    moe_prune_by: str = flag(
        *("rows", "rows of each map, over all experts and layers; units: as many hidden units of every expert", "start continued"),
        choices=("rows", "units"),
        needs="moe_prune_to",
        since="units",
    )
    dense_width: str = expert_flag(
        "expert", "width of dense layers: of one expert (official), or of all", "experts", choices=("expert", "all"), since="expert"
    )
    moe_top_k: int | None = expert_flag(None, "active experts per token, k, if constant. Default: E/2", follows="moe_num_expert")
    gate_name: str = expert_flag(
        "random", f"router: {', '.join(ROUTERS)}, or an official name", "experts", choices=ChainMap(ROUTER_ALIASES, ROUTERS)
    )
    moe_index: str | None = expert_flag(None, "layers with experts, such as 0,1,2,3. Default: all", "experts")
    freeze_gate: bool = expert_flag(False, "do not train the router", "training")
    load_balance: float | None = expert_flag(
        None, "coefficient of the load-balance loss. Default: the router's", "training", low=0, follows="gate_name"
    )
    dynamic_moe: bool = expert_flag(False, "change k during training", "continued")
    dynamic_moe_mode: str = expert_flag("linear_increase", "schedule of k", "training", choices=SCHEDULES)
    dynamic_overall_steps: int = expert_flag(-1, "steps over which k changes (-1: --max_step)", low=1, special=-1, follows="max_step")
    moe_top_k_min: int | None = expert_flag(None, "smallest k of the schedule. Default: E/2", follows="moe_num_expert")
    moe_top_k_max: int | None = expert_flag(None, "largest k of the schedule. Default: E", follows="moe_num_expert")
    output_scale: str = expert_flag(
        "mean", "mean: weighted mean of the experts (official); dense: E times that", "experts", choices=get_args(OutputScale)
    )
    gate_weight: str = expert_flag(
        "softmax",
        "of the selected logits (official), or of all: pre_softmax; sigmoid; uniform; unit",
        "experts",
        choices=get_args(GateWeight),
    )
    expert_backend: str = expert_flag(
        "auto", "implementation of the experts; all give the same result", "run evaluation", choices=("auto", *BACKENDS)
    )
    attn_moe: bool = expert_flag(False, "official: queries, keys and values from 16 top-1 experts, in MoE layers", "experts")
    freeze_main_network: bool = expert_flag(False, "official: do not train the experts")
    freeze_main_network_all: bool = expert_flag(False, "official: within the layers, train the routers only")
    train_only: str | None = expert_flag(
        None, "experts: with routers that are not frozen; adapters: of low rank, beside the experts' maps", choices=TRAINED, since=None
    )
    adapter_rank: int = flag(8, "rank of the adapters", low=1, needs="train_only", since=8)
    dynamic_router_start: int = expert_flag(-1, "official: step at which the router is frozen (-1: see --freeze_gate)", low=0, special=-1)


@group
class OptimiserFlags:
    title = "optimiser"

    optim: str = flag("adam", "optimiser", choices=("adam", "adamw", "sgd", "adagrad"))
    lr: float = flag(2.5e-4, "learning rate", above=0)
    mom: float = flag(0.0, "momentum of sgd", low=0, below=1)
    weight_decay: float = flag(0.01, "weight decay of adamw", low=0)
    decayed: str = flag(
        "all", "what adamw's weight decay acts on; matrices: not on biases, norms and routers", choices=("all", "matrices"), since="all"
    )
    scheduler: str = flag("cosine", "learning-rate schedule", choices=("cosine", "linear", "inv_sqrt", "constant", "dev_perf"))
    warmup_step: int = flag(0, "steps of linear warm-up", low=0)
    eta_min: float = flag(0.0, "final learning rate of cosine", low=0)
    decay_rate: float = flag(0.5, "dev_perf: factor applied when validation stops improving", above=0)
    patience: int = flag(0, "dev_perf: validations without improvement before the decay", low=0)
    lr_min: float = flag(0.0, "dev_perf: smallest learning rate", low=0)
    clip: float = flag(0.25, "largest gradient norm", above=0)
    max_step: int = flag(400_000, "training steps", low=1)
    tokens: int | None = flag(None, "training tokens, in place of --max_step: whole batches up to this many", "run", low=1, since=None)
    swad: bool = flag(False, "average the weights over steps swad_start to swad_end, and evaluate the average as well", "run")
    swad_start: int = flag(0, "first step of the average", "run", low=0, needs="swad")
    swad_end: int = flag(-1, "last step of the average (-1: --max_step)", "run", low=1, special=-1, follows="max_step")


@group
class MachineFlags:
    title = "machine and logging"

    device: str = flag("auto", "auto: a GPU if there is one", "run evaluation", choices=("auto", "cpu", "cuda"))
    cuda: bool = flag(False, "official: --device cuda", "run unstored evaluation")
    multi_gpu: bool = flag(False, "official, no effect: start several GPUs with torchrun --nproc_per_node N", "run unstored evaluation")
    precision: str = flag("fp32", "fp32, or bf16 autocast", "run", choices=("fp32", "bf16"))
    threads: int = flag(0, "CPU threads per process (0: torch's choice)", "run evaluation", low=0, high=1024)
    compile: bool = flag(False, "train with torch.compile; refused for methods it cannot capture", "run", since=False)
    tune_cpu: bool = flag(
        False, "on a CPU: keep freed memory, and use oneDNN for fp32 products where no precision is lost", "run evaluation"
    )
    log_interval: int = flag(200, "steps between log lines", "run", low=1)
    eval_interval: int = flag(4000, "steps between validations, each followed by a checkpoint", "run", low=1)
    save_interval: int = flag(0, "steps between additional checkpoints (0: none)", "run", low=0)


@group
class Flags(MachineFlags, OptimiserFlags, ExpertFlags, ModelFlags, DataFlags, StartFlags, RunFlags):
    """Pre-trains a language model, dense or with experts, and tests it at every number of active experts."""

    def default_folder(self) -> str:
        """The folder that holds the runs of one table."""
        origin = {"from": self.start_from, "settings_from": self.settings_from}
        start = "".join(f"/{word}/{PurePath(path).name}" for word, path in origin.items() if path)
        model = f"/{self.model}" if self.model != RunFlags.model else ""
        return f"runs/{self.preset}{model}/{self.dataset}{start}"


@group
class TaskFlags:
    title = "task"

    task: str = flag("sst2", "what to fine-tune on", "run", choices=TASKS)
    checkpoint: str = folder(
        "", "finished run, one of its checkpoints/step-*, folder of surgery.py or save_pretrained, or weights", "run replaceable"
    )
    expect: str | None = flag(None, "refuse a checkpoint of another method; dense ones are equivalent", "run replaceable", choices=METHODS)
    from_scratch: bool = flag(False, "start from random weights, in a model of the checkpoint's size", "variant")
    fold: int = flag(0, "tasks with folds: the one held out", "run", low=0)
    max_length: int = flag(512, "maximum number of positions of a row; longer rows are refused", "run", low=3)
    head_dropout: str = flag(
        "once", "between Transformer-XL and a head that chooses; earlier runs: twice", "variant", choices=("once", "twice"), since="twice"
    )
    tokenizer: str | None = folder(None, "pieces, tokens: folder of the tokenizer. Default: that of the checkpoint's text, or in it", "run")


@group
class FinetuneFlags(Flags, TaskFlags):
    """Fine-tunes a pre-trained model on a task and tests it at every number of active experts. The checkpoint sets the model's flags."""

    hidden = (StartFlags.title,)  # refused, so not listed by --help

    def default_folder(self) -> str:
        fold = f"/fold{self.fold}" if kind_of(self.task).folds > 1 else ""
        start = "/from_scratch" if self.from_scratch else ""
        return f"runs/{self.preset}/table2/{self.model}/{self.task}{fold}{start}"


@group
class OperationFlags:
    title = "operation"

    source: str = folder(MISSING, "finished run, one of its checkpoints/step-*, or folder of surgery.py", name="from")
    method: str = flag(MISSING, "how the model is made smaller", choices=(*SURGERIES, COMPRESS))
    keep: int | None = flag(None, "experts to keep per layer; merge, average, drop and --pooled: on average", only=tuple(SURGERIES))
    by_layer: bool = flag(False, "keep the same number in every layer", "option", only=AVERAGING)
    pooled: bool = flag(False, "numbers that differ by layer, from the scores of all layers", "option", only=EQUAL)
    compare: str | None = flag(
        None, "of router logits: all positions read (default), or a sample of 256", "option", choices=COMPARE, only=("merge", "average")
    )
    align: str | None = flag(
        None, "hidden units: to the layer's first expert (default), or a group's leader", "option", choices=ALIGN, only=("merge",)
    )
    at_least: int | None = flag(None, "fewest experts of a layer where numbers differ. Default: 1", "option", low=1, only=tuple(SURGERIES))
    score: str | None = flag(None, "how experts are ranked. Default: usage", "option", choices=SCORES, only=("keep_best",))
    rank: int | None = flag(None, "rank of U V in W = U V + S", "option", only=(COMPRESS,))
    kept: float | None = flag(None, "share of the hidden units left in S after training", "option", above=0, high=1, only=(COMPRESS,))
    seed: int = same_flag(Flags, "seed", help="random seed of samples and clusters")
    out: str | None = folder(None, "folder to write. Default: runs/<preset>/surgery/<run>-<method>-<keep>, with options and task")


@group
class CalibrationFlags:
    title = "calibration and test"

    calibrate: str | None = folder(None, "prepared text, or with --task its rows. Default: the run's text, or data/<task>", "calibration")
    task: str | None = flag(None, "calibrate on the rows of a task instead of a text; padding is not counted", "calibration", choices=TASKS)
    fold: int | None = flag(None, "tasks with folds: the one not read, to hold out in fine-tuning. Default: 0", "calibration", low=0)
    k: int | None = flag(None, "active experts during calibration. Default: E/2; at E, usage is uniform", "calibration")
    examples: int = flag(256, "rows of a task, or segments of a text, to read", low=1)
    tokens: int | None = flag(None, "positions to read instead", low=1)
    data: str | None = folder(None, "prepared text to test both models on. Default: the run's")
    max_test_steps: int | None = same_flag(Flags, "max_test_steps", default=None, help="batches per test (-1: all). Default: the run's")
    device: str = same_flag(Flags, "device")
    threads: int = same_flag(Flags, "threads")


@group
class SurgeryFlags(CalibrationFlags, OperationFlags):
    """Makes a trained mixture-of-experts model smaller, and measures both models."""


@group
class GenerateFlags:
    """Continues a prompt, byte by byte, with a trained Transformer-XL at any number of active experts."""

    title = "generation"

    checkpoint: str = folder(MISSING, "finished run, one of its checkpoints/step-*, or folder of surgery.py")
    k: int | None = flag(None, "active experts. Default: all")
    draft_k: int | None = flag(None, "active experts while drafting bytes, which are verified at --k. Default: no drafts", low=1)
    draft_length: int | None = flag(None, "bytes drafted at a time. Default: 4", low=1, high=32)
    prompt: str | None = flag(None, "text to continue. Default: standard input if it is a pipe, else a newline", "verbatim")
    length: int = flag(500, "bytes to write", low=1)
    temperature: float = flag(0.8, "sampling temperature (0: always the likeliest byte)", low=0)
    top_p: float = flag(0.95, "sample among the likeliest bytes that together have this probability", above=0, high=1)
    seed: int = same_flag(Flags, "seed", help="random seed")
    precision: str = same_flag(
        Flags, "precision", help="precision of the weights; int8: of the experts only", choices=("fp32", "bf16", "int8")
    )
    threads: int = same_flag(Flags, "threads")


@group
class ConvertFlags:
    """Cuts the FFNs of a trained transformers model into experts, without training, so that it runs at any number of them."""

    title = "conversion"

    source: str = flag(MISSING, "folder of a transformers model, GGUF file, or hub id such as owner/name", metavar="MODEL", name="from")
    data: str = flag(MISSING, "UTF-8 text that the cut is calibrated on, also .xz; its last tenth is held out", metavar="FILE")
    out: str = folder(MISSING, "new folder of the converted model")
    num_experts: int = flag(16, "experts of a layer, E, which must divide the FFN width", low=1)
    expert_init: str = flag("split", "copy: experts are copies of the whole network, for fine-tuning", choices=("split", "copy"))
    cut: str | None = flag(None, "which neurons form an expert together. Default: coactivation", choices=tuple(CUTS))
    router: str = flag("learned", "learned: linear, fitted by regression", choices=tuple(ROUTERS))
    shared_experts: int = flag(0, "experts of the most important neurons, which every token chooses", low=0)
    gate_weight: str | None = flag(None, "softmax: later training trains the router. Default: unit, exact", choices=("unit", "softmax"))
    correction: str | None = flag(None, "of what is left out; mean needs a shared expert. Default: norm if exact", choices=CORRECTIONS)
    k: int | None = flag(None, "active experts of the saved model, which any use of it may change. Default: E", low=1)
    tokens: int = flag(8192, "tokens that the cut is calibrated on", low=1)
    held_out: int = flag(4096, "tokens that the loss is measured on, at each k", low=1)
    length: int = flag(512, "tokens read at a time", low=2)
    precision: str = flag("auto", "precision of the weights; auto: as stored, GGUF files in fp32", choices=("auto", "fp32", "bf16", "fp16"))
    seed: int = same_flag(Flags, "seed", help="random seed")
    device: str = same_flag(Flags, "device")
    threads: int = same_flag(Flags, "threads")


def names(*, role: str | None = None, group: str | None = None, follows: str | None = None, kind: type = FinetuneFlags) -> tuple[str, ...]:
    """The flags of a program with a role, in a group, or derived from another flag, in order of declaration."""
    inside = specs(groups(kind)[group]) if group else specs(kind)
    return tuple(
        name for name, spec in inside.items() if (role is None or role in spec.roles) and (follows is None or spec.follows == follows)
    )


def defaults_before(kind: type = Flags) -> dict:
    """The values of flags in runs made before these flags existed."""
    return {name: spec.since for name, spec in specs(kind).items() if spec.since is not ABSENT}
