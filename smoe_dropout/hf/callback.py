"""k's schedule as a callback of transformers' Trainer. Importing this imports transformers."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from smoe_dropout.control import get_top_k, moe_layers, set_top_k
from smoe_dropout.options import ConfigError
from smoe_dropout.schedule import TopKSchedule
from smoe_dropout.training import set_progress


class TopKScheduleCallback(TrainerCallback):
    """Sets k before every optimiser step, as `TopKSchedule(mode, k_min, k_max, total_steps, seed)` says, and tells a method's layers where
    training stands (`set_progress`).

    total_steps: when the schedule ends; None: with training. k is a function of the step alone, so a resumed run goes on as if it had never
    stopped, and all micro-batches of a step have one k. Evaluations on the way run at the k of the step before them; after training k stays
    that of the last step: `set_top_k` or `with top_k(...)` takes another. Every entry of the Trainer's log history has `top_k`; loggers
    that stand before this callback, as those of `report_to` do, have seen the entry without it.

    ConfigError when training starts, for a model without MoE layers, k_max beyond its experts, or label smoothing, whose loss the Trainer
    computes by itself, without the auxiliary losses. ValueError at once, for a schedule that cannot be.
    """

    def __init__(self, mode: str, k_min: int, k_max: int, total_steps: int | None = None, seed: int = 0):
        self.settings, self.total_steps, self.seed = (mode, k_min, k_max), total_steps, seed
        self.schedule = self._schedule(total_steps or 1)  # a mistake is told here, not when training starts

    def _schedule(self, total_steps: int) -> TopKSchedule:
        return TopKSchedule(*self.settings, total_steps, self.seed)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        layers = moe_layers(model)
        if not layers:
            raise ConfigError(
                f"{type(model).__name__} has no MoE layers whose k could follow a schedule: call moefy(model, SMoEConfig(...))"
            )
        self.schedule = self._schedule(state.max_steps if self.total_steps is None else self.total_steps)
        for name, layer in layers:
            if self.schedule.k_max > (most := layer.config.num_experts):
                raise ConfigError(f"k_max = {self.schedule.k_max} is more than the {most} experts of layer {name!r}")
        if args.label_smoothing_factor and any(layer.own_losses or getattr(layer.router, "balance_loss", 0) for _, layer in layers):
            raise ConfigError(
                f"label_smoothing_factor = {args.label_smoothing_factor}: the Trainer then computes the loss by itself, without the "
                "auxiliary losses; leave it out, or set balance_loss=0"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        set_top_k(model, self.schedule(state.global_step))
        set_progress(model, state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, model: nn.Module, logs: dict[str, Any] | None = None, **_: Any) -> None:
        k = get_top_k(model)
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry["top_k"] = k
