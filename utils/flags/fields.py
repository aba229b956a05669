"""The flags of train.py and finetune.py, official ones and ours, each declared once, and what holds of single flags. Imports no torch."""

from dataclasses import dataclass
from pathlib import PurePath

from smoe_dropout.schedule import SCHEDULES
from utils.data.rows import KINDS
from utils.flags.presets import PRESETS


@dataclass(frozen=True)
class Flags:
    """Pre-trains a language model and evaluates it at every number of active experts."""

    # --- what to run
    method: str | None = None
    """a training method by name; stands for the flags in its file. Without it the official flags decide"""
    model: str = "transformer_xl"
    """transformer_xl over bytes, or bert or roberta over word pieces"""
    preset: str = "paper"
    """sizes and lengths: paper, laptop or quick"""
    work_dir: str | None = None
    """the run's folder, exactly; default runs/<preset>/[<model>/]<dataset>/<run_name>-seed<seed>. The same command again resumes"""
    method_options: str | None = None
    """options of the method and the router, such as alpha=5,inference=token; a wrong one lists those there are"""
    run_name: str | None = None
    """name in the default work_dir; default the method's"""
    seed: int = 1111
    """random seed of initialisation, router, dropout, and for word pieces order and masks"""
    yes: bool = False
    """go on although a CPU would take hours"""
    start_from: str | None = None
    """weights to start from instead of random ones: a finished run, or a folder made by surgery.py. They say what the model is"""
    teacher: str | None = None
    """with --start_from: a finished run of such a model, whose predictions at k = E are learned, too"""
    teacher_weight: float = 0.2
    """what the divergence from the teacher counts beside the loss"""
    teacher_temperature: float = 2.0
    """by which both models' logits are divided before they are compared"""
    eval_only: bool = False
    """re-evaluate the best weights of --work_dir at --k, with the run's own flags"""
    k: str | None = None
    """with --eval_only: numbers of active experts, such as 1,2,4"""

    # --- data
    data: str | None = None
    """folder made by data/prepare.py, for word pieces by data/prepare_pieces.py; default data/<dataset>"""
    dataset: str = "enwik8"
    """name of the data set; default the preset's, with --data the name of its folder"""
    batch_size: int = 22
    """lanes read side by side, or sequences, over all processes"""
    batch_chunk: int = 1
    """parts a batch is computed in, to save memory; the same result, but that a method's own losses and draws are each part's"""
    tgt_len: int = 512
    """positions per training segment, or of a sequence"""
    mem_len: int = 512
    """positions of memory in training"""
    eval_tgt_len: int = 128
    """positions per evaluation segment; memory is then mem_len + tgt_len - eval_tgt_len"""
    eval_batch_size: int = 10
    """lanes or sequences in evaluation"""
    mask_rate: float = 0.15
    """share of pieces that bert and roberta have to name"""
    max_eval_steps: int = -1
    """batches of a validation during training (-1: all)"""
    max_test_steps: int = -1
    """batches of the final test (-1: all); the record says how much was read"""

    # --- model
    n_layer: int = 4
    """layers"""
    n_head: int = 8
    """attention heads"""
    d_head: int = 64
    """width of a head"""
    d_model: int = 256
    """width of the model"""
    d_ff: int | None = None
    """width of the dense feed-forward layer; experts share it equally"""
    d_inner: int | None = None
    """official: width of the dense feed-forward layer, or of one expert with --moe; default from --d_ff"""
    dropout: float = 0.1
    """dropout rate"""
    dropatt: float = 0.0
    """dropout rate of attention probabilities"""
    pre_lnorm: bool = False
    """LayerNorm before each sublayer instead of after"""
    same_length: bool = False
    """every position attends equally far back"""
    clamp_len: int = -1
    """distances beyond it share one position embedding (-1: none)"""
    not_tied: bool = False
    """separate input and output embeddings"""
    init_std: float = 0.02
    """standard deviation of initial weights"""

    # --- experts
    moe: bool = False
    """experts instead of dense feed-forward layers"""
    moe_num_expert: int = 16
    """experts per layer, E"""
    moe_experts_by_layer: str | None = None
    """experts of each layer that has them where these differ, such as 8,6,10,8; --moe_num_expert is the largest"""
    moe_expert_rank: int | None = None
    """experts compressed by surgery.py: their maps are U V of this rank, and S"""
    moe_sparse_share: float = 1.0
    """share of the hidden units that S has"""
    moe_prune_to: float | None = None
    """with --start_from, share of the hidden units that S is left with at the end; the others are taken away while training"""
    dense_width: str = "expert"
    """width of feed-forward layers without experts, with --moe_index: that of one expert (official), or of all together"""
    moe_top_k: int | None = None
    """experts active per token where k is constant; default E/2"""
    gate_name: str = "random"
    """router: a name in smoe_dropout/registry.py, such as random, learned or hash, or an official one"""
    moe_index: str | None = None
    """layers that get experts, such as 0,1,2,3; default all"""
    freeze_gate: bool = False
    """do not train the router"""
    load_balance: float | None = None
    """coefficient of the Switch load-balance loss; default the router's own"""
    dynamic_moe: bool = False
    """let k change during training"""
    dynamic_moe_mode: str = "linear_increase"
    """how k changes"""
    dynamic_overall_steps: int = -1
    """steps over which k changes; -1: max_step"""
    moe_top_k_min: int | None = None
    """smallest k of the schedule; default E/2"""
    moe_top_k_max: int | None = None
    """largest k of the schedule; default E"""
    output_scale: str = "mean"
    """mean: official, weighted mean of the experts; dense: times E"""
    gate_weight: str = "softmax"
    """softmax of the kept logits, or uniform"""
    expert_backend: str = "auto"
    """how experts are computed; all give the same result"""
    attn_moe: bool = False
    """official: queries, keys and values from 16 top-1 experts, in the layers that have experts"""
    freeze_main_network: bool = False
    """official: do not train the experts"""
    freeze_main_network_all: bool = False
    """official: train nothing in the layers but routers"""
    dynamic_router_start: int = -1
    """official: the router is trained up to this step and frozen from then on; -1: as --freeze_gate says"""
    dense_drop: bool = False
    """official: dense feed-forward layers, of which whole blocks are dropped"""

    # --- optimiser
    optim: str = "adam"
    """adam, adamw, sgd or adagrad"""
    lr: float = 2.5e-4
    """learning rate"""
    mom: float = 0.0
    """momentum of sgd"""
    weight_decay: float = 0.01
    """of adamw"""
    scheduler: str = "cosine"
    """cosine, linear, inv_sqrt, constant or dev_perf"""
    warmup_step: int = 0
    """steps of linear warm-up"""
    eta_min: float = 0.0
    """last learning rate of cosine"""
    decay_rate: float = 0.5
    """dev_perf: factor when validation stops falling"""
    patience: int = 0
    """dev_perf: validations without improvement before the decay"""
    lr_min: float = 0.0
    """dev_perf: smallest learning rate"""
    clip: float = 0.25
    """largest gradient norm"""
    max_step: int = 400_000
    """training steps"""
    swad: bool = False
    """keep the mean of the weights over steps swad_start to swad_end, and evaluate it beside the model"""
    swad_start: int = 0
    """first step of the mean"""
    swad_end: int = -1
    """last step of the mean; -1: max_step"""

    # --- machine and records
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda"""
    cuda: bool = False
    """official: --device cuda"""
    multi_gpu: bool = False
    """official; several GPUs are used by starting with torchrun --nproc_per_node N"""
    precision: str = "fp32"
    """fp32, or bf16 autocast"""
    threads: int = 0
    """CPU threads per process; 0: torch's choice"""
    compile: bool = False
    """train by torch.compile: one graph for every k, and refused where a method cannot be one"""
    tune_cpu: bool = False
    """on a CPU, keep freed memory, and multiply in float32 by oneDNN where that loses no precision"""
    log_interval: int = 200
    """steps between log lines"""
    eval_interval: int = 4000
    """steps between validations, each followed by a checkpoint"""
    save_interval: int = 0
    """steps between further checkpoints; 0: only with validations"""

    def default_folder(self) -> str:
        """Where runs of one table lie side by side."""
        start = f"/from/{PurePath(self.start_from).name}" if self.start_from else ""
        model = f"/{self.model}" if self.model in OF_PIECES else ""
        return f"runs/{self.preset}{model}/{self.dataset}{start}"


@dataclass(frozen=True)
class FinetuneFlags(Flags):
    """Fine-tunes a pre-trained model on a task and tests it at every number of active experts"""

    # --- what to start from, and what for; sizes and method are the checkpoint's
    task: str = "sst2"
    """sst2, csqa, asdiv_a, mawps or svamp"""
    checkpoint: str = ""
    """a finished run of train.py, one of its checkpoints/step-*, a folder of smoe_dropout.save_pretrained, or of weights"""
    expect: str | None = None
    """refuse a checkpoint of another method; one without experts stands for all that have none"""
    from_scratch: bool = False
    """start from random weights, in a model like the checkpoint's"""
    fold: int = 0
    """asdiv_a and mawps: which of the five folds is held out"""
    max_length: int = 512
    """positions a row may have; a longer one is refused"""
    tokenizer: str | None = None
    """of bert and roberta: the folder; default the one in the text that the checkpoint was trained on"""

    def default_folder(self) -> str:
        fold = f"/fold{self.fold}" if KINDS[self.task].folds > 1 else ""
        start = "/from_scratch" if self.from_scratch else ""
        return f"runs/{self.preset}/table2/{self.model}/{self.task}{fold}{start}"


# official flags that make no sense here: refused with what to use, never ignored
REFUSED: dict[str, str] = {
    "fp16": "use --precision bf16",
    "static_loss_scale": "use --precision bf16, which needs no loss scale",
    "dynamic_loss_scale": "use --precision bf16, which needs no loss scale",
    "restart": "start the same command again: it resumes from its --work_dir",
    "restart_dir": "start the same command again: it resumes from its --work_dir",
    "debug": "use --max_step and another --work_dir",
    "gpu0_bsz": "use torchrun --nproc_per_node N train.py, which splits the batch evenly",
    "ext_len": "use --mem_len",
    "d_embed": "the embedding has the width --d_model",
    "attn_type": "attention is the official default, relative with memory (0)",
    "adaptive": "data are bytes: the softmax needs no clusters",
    "div_val": "data are bytes: the softmax needs no clusters",
    "sample_softmax": "data are bytes: the softmax is never sampled",
    "varlen": "segments have the fixed length --tgt_len",
    "init": "weights start from N(0, --init_std^2)",
    "init_range": "weights start from N(0, --init_std^2)",
    "emb_init": "weights start from N(0, --init_std^2)",
    "emb_init_range": "weights start from N(0, --init_std^2)",
    "proj_init_std": "weights start from N(0, --init_std^2)",
    "clip_nonemb": "use --clip, which takes all parameters",
    "finetune_v2": "use finetune.py",
    "finetune_v3": "use finetune.py",
    "expert_drop": "use --dense_drop --method_options rate=0.5",
    "num_expert": "use --moe_num_expert, or for --dense_drop --method_options blocks=16",
    "min_temp": "use --method_options min_temp=0.3",
    "max_temp": "use --method_options max_temp=2",
    "threshold": "use --method_options threshold=0.001",
}
# flags that mean nothing to a model, and have to be left out
_OF_TRANSFORMER_XL = ("mem_len", "eval_tgt_len", "d_head", "pre_lnorm", "same_length", "clamp_len", "not_tied", "attn_moe", "dense_width")
OF_PIECES = ("bert", "roberta")
MEANINGLESS = {"transformer_xl": ("mask_rate",), "bert": _OF_TRANSFORMER_XL, "roberta": _OF_TRANSFORMER_XL}
CHOICES = {
    "model": tuple(PRESETS),
    "preset": tuple(PRESETS["transformer_xl"]),
    "optim": ("adam", "adamw", "sgd", "adagrad"),
    "scheduler": ("cosine", "linear", "inv_sqrt", "constant", "dev_perf"),
    "device": ("auto", "cpu", "cuda"),
    "precision": ("fp32", "bf16"),
    "dynamic_moe_mode": tuple(SCHEDULES),
    "dense_width": ("expert", "all"),
}
POSITIVE = (
    *("batch_size", "batch_chunk", "tgt_len", "eval_tgt_len", "eval_batch_size", "n_layer", "n_head", "d_head", "d_model"),
    *("moe_num_expert", "max_step", "log_interval", "eval_interval"),
)
OF_EXPERTS = (
    *("moe_top_k", "gate_name", "moe_index", "freeze_gate", "load_balance", "dynamic_moe", "dynamic_moe_mode", "dynamic_overall_steps"),
    *("moe_experts_by_layer", "moe_expert_rank", "moe_sparse_share", "moe_prune_to"),
    *("moe_top_k_min", "moe_top_k_max", "output_scale", "gate_weight", "dense_width", "expert_backend"),
    *("attn_moe", "freeze_main_network", "freeze_main_network_all", "dynamic_router_start"),
)
# what decides a run but not what method it is; and what follows from other flags unless it is given
OF_THE_RUN = (
    *(
        "method",
        "model",
        "preset",
        "work_dir",
        "run_name",
        "seed",
        "yes",
        "start_from",
        "teacher",
        "teacher_weight",
        "teacher_temperature",
        "eval_only",
        "k",
        "data",
        "dataset",
        "batch_chunk",
        "eval_batch_size",
        "task",
        "checkpoint",
        "expect",
        "fold",
        "max_length",
        "tokenizer",
    ),
    *(
        "max_eval_steps",
        "max_test_steps",
        "expert_backend",
        "swad",
        "swad_start",
        "swad_end",
        "device",
        "cuda",
        "multi_gpu",
        "precision",
        "threads",
        "compile",
        "tune_cpu",
    ),
    *("log_interval", "eval_interval", "save_interval"),
)
# flags that older runs do not say, and what they were made with
SINCE = {
    **{"start_from": None, "teacher": None, "teacher_weight": 0.2, "teacher_temperature": 2.0},
    **{"moe_experts_by_layer": None, "moe_expert_rank": None, "moe_sparse_share": 1.0, "moe_prune_to": None, "compile": False},
    "dense_width": "expert",
}
OF_THE_START = ("from_scratch",)  # of fine-tuning, and said beside the method
DERIVED = ("d_ff", "d_inner", "moe_top_k", "moe_top_k_min", "moe_top_k_max", "dynamic_overall_steps", "load_balance")
NOT_NEGATIVE = (
    "mem_len",
    "warmup_step",
    "mom",
    "eta_min",
    "lr_min",
    "patience",
    "threads",
    "save_interval",
    "seed",
    "swad_start",
    "weight_decay",
)
# what the weights mean: the checkpoint's, always
OF_THE_MODEL = (
    *("model", "n_layer", "n_head", "d_head", "d_model", "d_ff", "d_inner", "tgt_len", "mem_len", "eval_tgt_len", "mask_rate"),
    *("pre_lnorm", "same_length", "clamp_len", "not_tied", "init_std"),
)


OF_THE_EXPERTS = (
    *("method", "moe", "moe_num_expert", "moe_experts_by_layer", "gate_name", "moe_index", "output_scale", "gate_weight", "attn_moe"),
    *("moe_expert_rank", "moe_sparse_share", "dense_drop", "dense_width"),
)


# what it is trained with: the checkpoint's, unless something else is asked for
KEPT = ("dynamic_moe_mode", "method_options", "dropout", "dropatt", "freeze_gate", "load_balance")
