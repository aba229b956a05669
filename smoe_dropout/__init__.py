"""Sparse mixture-of-experts as dropout, for any Transformer (Chen et al., ICLR 2023, arXiv 2303.01610).

    import smoe_dropout as sd
    sd.moefy(model, sd.SMoEConfig(num_experts=16, top_k=8))   # replace the FFNs with MoE layers, in place
    schedule = sd.TopKSchedule("linear_increase", 8, 16, total_steps)
    sd.set_top_k(model, schedule(step))                         # before each training step
    with sd.top_k(model, 4): ...                                # any k at inference

Models of the transformers library, trained with its Trainer:

    trainer = Trainer(model, ..., callbacks=[sd.TopKScheduleCallback("linear_increase", 8, 16)])
    sd.save_pretrained(model, folder); model = sd.from_pretrained(folder)

Surgery, which reduces the experts of a trained model:

    calibration = sd.calibrate(model, passes)
    smaller, config = sd.operate(model, "merge", 8, calibration)

Importing this package does not import torch; the first use of a name that needs torch does.
"""

import importlib

from smoe_dropout.hf.hooks import register

_EXPORTS = {
    "SMoEConfig": "config",
    "ConfigError": "options",
    "TopKSchedule": "schedule",
    "SCHEDULES": "schedule",
    "moefy": "conversion",
    "adopt": "conversion",
    "report": "summary",
    "convert": "recipe",
    "Recipe": "recipe",
    "unmoefy": "restoration",
    "MoELayer": "layer",
    "Routing": "routers",
    "set_top_k": "control",
    "get_top_k": "control",
    "top_k": "control",
    "top_p": "control",
    "mean_k": "control",
    "freeze_routers": "control",
    "moe_layers": "control",
    "auxiliary_loss": "control",
    "expert_load": "control",
    "token_mask": "passes",
    "parameter_groups": "decay",
    "set_progress": "training",
    "method_metrics": "training",
    "slim": "slimming",
    "plan": "planning",
    "Plan": "planning",
    "examine": "microscope",
    "calibrate": "surgery",
    "Calibration": "surgery",
    "operate": "surgery",
    "compress": "surgery.compression",
    "Pruner": "surgery.compression",
    "tune_cpu": "tuning",
    "save_model": "io",
    "load_weights": "io",
    "from_official": "io",
    "to_official": "io",
    "save_pretrained": "hf.pretrained",
    "from_pretrained": "hf.pretrained",
    "TopKScheduleCallback": "hf.callback",
}
__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__():
    return [*globals(), *__all__]


register()
