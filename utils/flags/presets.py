"""Presets: named sets of defaults, over those declared in fields.py. Those of pre-training are found by a model's entry in models.py."""

from utils.flags.models import MODELS

_WIKITEXT = {"not_tied": True, "lr": 7e-4, "scheduler": "constant", "clip": 1.0, "attack": "swap"}
TRANSFORMER_XL: dict[str, dict] = {
    # arXiv 2303.01610 and its official scripts, whose other settings are the defaults in fields.py: enwik8, 400,000 steps; meant for a GPU
    "paper": {"d_ff": 8192},
    # 1.4 M parameters, 6 M tokens: about ten minutes per method on one core with native bf16 products. Training is too short to
    # overfit, hence no dropout
    "laptop": {
        **{"n_layer": 4, "d_model": 128, "n_head": 4, "d_head": 32, "d_ff": 1024, "dropout": 0.0},
        **{"lr": 1e-3, "max_step": 3000},
        **{"batch_size": 16, "tgt_len": 128, "mem_len": 128, "eval_tgt_len": 128},
        **{"log_interval": 50, "eval_interval": 500, "max_eval_steps": 40, "max_test_steps": 400, "precision": "bf16", "tune_cpu": True},
    },
    # the paper's shape and proportions scaled down: 0.36 M parameters, 95 tokens and 4.6 bytes of text per parameter (paper: 231 and 4.6),
    # experts and attention twice as wide as the model, dropout 0.1
    "replica": {
        **{"dataset": "enwik8-2mb", "n_layer": 2, "d_model": 48, "n_head": 4, "d_head": 24, "d_ff": 1536},
        **{"lr": 1e-3, "max_step": 16_700},
        **{"batch_size": 32, "tgt_len": 64, "mem_len": 64, "eval_tgt_len": 64, "eval_batch_size": 32},
        **{"log_interval": 100, "eval_interval": 2500, "precision": "bf16", "tune_cpu": True},
    },
    # words, on one CPU core of any kind: 1.2 M words, of WikiText-2 or a text of its size. Without a warm-up the dense model hardly learns
    "words": {
        **{"dataset": "wikitext-2", "n_layer": 3, "d_model": 128, "n_head": 4, "d_head": 32, "d_ff": 1024, "dropout": 0.0},
        **{"lr": 5e-4, "warmup_step": 200, "max_step": 1200, "batch_size": 16, "tgt_len": 64, "mem_len": 64, "eval_tgt_len": 64},
        **{"adaptive": True, "cutoffs": "2000,10000", "div_val": 2, "attack": "swap"},
        **{"log_interval": 50, "eval_interval": 400, "eval_batch_size": 32, "max_eval_steps": 10, "max_test_steps": 28, "tune_cpu": True},
    },
    # rachtsy/MomentumSMoE, scripts/pretraining/wikitext-103: 16 experts as wide as the model; meant for a GPU. Its Transformer has other
    # positions and a head of its own; batch and steps of the medium size are those of the one script that it has
    "wikitext103_small": {
        **{"dataset": "wikitext-103", "n_layer": 3, "d_model": 128, "n_head": 8, "d_head": 16, "d_ff": 2048, "dropout": 0.7},
        **{**_WIKITEXT, "warmup_step": 3000, "max_step": 40_000, "batch_size": 96, "tgt_len": 256, "mem_len": 256, "eval_tgt_len": 256},
    },
    "wikitext103_medium": {
        **{"dataset": "wikitext-103", "n_layer": 6, "d_model": 352, "n_head": 8, "d_head": 44, "d_ff": 5632, "dropout": 0.1},
        **{**_WIKITEXT, "warmup_step": 4000, "max_step": 25_000, "batch_size": 24, "tgt_len": 512, "mem_len": 512, "eval_tgt_len": 512},
    },
    # for the quickstart: one or two minutes per method on two cores of any processor
    "quick": {
        **{"n_layer": 2, "d_model": 128, "n_head": 4, "d_head": 32, "d_ff": 512, "dropout": 0.0},
        **{"lr": 2e-3, "max_step": 1200},
        **{"batch_size": 16, "tgt_len": 64, "mem_len": 64, "eval_tgt_len": 64},
        **{"log_interval": 50, "eval_interval": 300, "max_eval_steps": 40, "max_test_steps": 80, "tune_cpu": True},
    },
}

# BERT and RoBERTa; {tokenizer} is the model's
_ENCODER: dict[str, dict] = {
    # arXiv 2303.01610: AdamW 5e-5, linear decay, batch 64, 100,000 steps. Not stated there: the base size with doubled feed-forward width,
    # and 512 pieces
    "paper": {
        **{"dataset": "bookcorpus-{tokenizer}", "n_layer": 12, "d_model": 768, "n_head": 12, "d_ff": 6144, "dropatt": 0.1},
        **{"optim": "adamw", "scheduler": "linear", "lr": 5e-5, "clip": 1.0, "max_step": 100_000},
        **{"batch_size": 64, "eval_batch_size": 64, "eval_interval": 5000, "max_eval_steps": 50, "precision": "bf16"},
    },
    "laptop": {
        **{"dataset": "books-{tokenizer}", "n_layer": 4, "d_model": 128, "n_head": 4, "d_ff": 1024, "dropout": 0.0},
        **{"optim": "adamw", "scheduler": "linear", "lr": 1e-3, "clip": 1.0, "warmup_step": 100, "max_step": 2000},
        **{"batch_size": 32, "eval_batch_size": 32, "tgt_len": 64},
        **{"log_interval": 50, "eval_interval": 500, "max_eval_steps": 40, "precision": "bf16", "tune_cpu": True},
    },
    "quick": {
        **{"dataset": "books-{tokenizer}", "n_layer": 2, "d_model": 64, "n_head": 2, "d_ff": 256, "dropout": 0.0},
        **{"optim": "adamw", "scheduler": "linear", "lr": 2e-3, "clip": 1.0, "warmup_step": 50, "max_step": 600},
        **{"batch_size": 16, "eval_batch_size": 16, "tgt_len": 64},
        **{"log_interval": 50, "eval_interval": 200, "max_eval_steps": 20, "max_test_steps": 80, "tune_cpu": True},
    },
}


def _encoder(tokenizer: str) -> dict[str, dict]:
    return {name: {**values, "dataset": values["dataset"].format(tokenizer=tokenizer)} for name, values in _ENCODER.items()}


# further training of a converted causal language model: its sizes are those of the folder it starts from
_RECOVERY = {
    **{"dataset": "text", "optim": "adamw", "scheduler": "cosine", "lr": 1e-4, "clip": 1.0, "precision": "bf16"},
    **{"log_interval": 10, "max_eval_steps": 8, "tune_cpu": True},
}
HF: dict[str, dict] = {
    "paper": {
        **_RECOVERY,
        **{"batch_size": 32, "eval_batch_size": 32, "tgt_len": 512, "max_step": 2000, "eval_interval": 200, "warmup_step": 50},
    },
    # a million tokens; some hours for 135 M parameters on two cores with native bf16 products
    "laptop": {
        **_RECOVERY,
        **{"batch_size": 4, "eval_batch_size": 8, "tgt_len": 256, "max_step": 1000, "eval_interval": 250, "warmup_step": 20},
    },
    "quick": {**_RECOVERY, "batch_size": 2, "eval_batch_size": 4, "tgt_len": 128, "max_step": 60, "eval_interval": 30, "warmup_step": 5},
}
BERT, ROBERTA = _encoder("bert-base-uncased"), _encoder("roberta-base")
PRESET_NAMES = tuple(TRANSFORMER_XL)

_FINETUNING: dict[str, dict] = {
    # arXiv 2303.01610, SST-2 from Transformer-XL. No settings are published for the other tasks, nor for BERT and RoBERTa
    "paper": {
        **{"lr": 1e-4, "max_step": 5000},
        **{"batch_size": 16, "eval_batch_size": 32, "log_interval": 100, "eval_interval": 500},
    },
    "laptop": {
        # lr: 5e-4 converges more slowly, and 1e-3 not at all
        **{"lr": 2e-4, "warmup_step": 100, "max_step": 2400, "batch_size": 32, "eval_batch_size": 32},
        **{"log_interval": 50, "eval_interval": 600, "precision": "bf16", "tune_cpu": True},
    },
    "quick": {
        **{"lr": 1e-3, "warmup_step": 50, "max_step": 400, "batch_size": 16, "eval_batch_size": 32},
        **{"log_interval": 50, "eval_interval": 200, "tune_cpu": True},
    },
}
_FINETUNING_ENCODER: dict[str, dict] = {
    "paper": {"optim": "adamw", "scheduler": "linear", "lr": 2e-5, "clip": 1.0, "warmup_step": 500, "precision": "bf16"},
    "laptop": {"optim": "adamw", "scheduler": "linear", "clip": 1.0},
    "quick": {"optim": "adamw", "scheduler": "linear", "clip": 1.0},
}
# their rows are three to eight times as long as those of SST-2
_WORD_PROBLEMS_ON_A_LAPTOP = {"lr": 5e-4, "max_step": 800, "eval_interval": 400}
_FINETUNING_TASK: dict[str, dict[str, dict]] = {
    "laptop": {
        "csqa": {"max_step": 600, "eval_interval": 300},
        **{task: _WORD_PROBLEMS_ON_A_LAPTOP for task in ("asdiv_a", "mawps", "svamp")},
    }
}
# a model that was trained on much text moves little; the decoder of equations is fresh
_FINETUNING_FOLDER = {task: {"lr": 2e-4} for task in ("asdiv_a", "mawps", "svamp")}
# the laptop's or the paper's for models of other presets, for which nothing is published
for _presets in (_FINETUNING, _FINETUNING_ENCODER, _FINETUNING_TASK):
    _presets |= {"replica": _presets["laptop"], "words": _presets["laptop"]}
    _presets |= {name: _presets.get("paper", {}) for name in ("wikitext103_small", "wikitext103_medium")}


def finetuning(task: str, preset: str, model: str) -> dict:
    """Flags of a preset for fine-tuning a model on a task."""
    encoder = _FINETUNING_ENCODER[preset] if "bytes" not in MODELS[model].reads else {}
    own = _FINETUNING_FOLDER.get(task, {"lr": 5e-5}) if MODELS[model].from_folder else {}
    return {**_FINETUNING[preset], **encoder, **_FINETUNING_TASK.get(preset, {}).get(task, {}), **own}
