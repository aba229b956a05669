"""Schedule of k as a callback of transformers' Trainer. Importing this module imports transformers."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from smoe_dropout.control import get_top_k, moe_layers, set_top_k
from smoe_dropout.options import ConfigError
from smoe_dropout.schedule import TopKSchedule
from smoe_dropout.training import set_progress


class TopKScheduleCallback(TrainerCallback):
    """Set k and the training progress before every optimiser step, following `TopKSchedule(mode, k_min, k_max, total_steps, seed)`.

    total_steps: length of the schedule; None: that of training.

    k depends on the global step only, so resumed runs continue exactly and all micro-batches of a step share one k. Evaluations during
    training run at the k of the preceding step, and after training k stays at its last value; change it with `set_top_k` or `top_k`. Every
    entry of the Trainer's log history has `top_k`. Loggers that run before this callback, such as those of `report_to`, do not see it.

    Raises ValueError for an invalid schedule, and at the start of training ConfigError for a model without MoE layers, k_max above the
    number of experts, or label smoothing, with which the Trainer computes the loss without the auxiliary losses.
    """

    def __init__(self, mode: str, k_min: int, k_max: int, total_steps: int | None = None, seed: int = 0):
        self.settings, self.total_steps, self.seed = (mode, k_min, k_max), total_steps, seed
        self.schedule = self._schedule(total_steps or 1)  # raises for an invalid schedule now, not when training starts

    def _schedule(self, total_steps: int) -> TopKSchedule:
        return TopKSchedule(*self.settings, total_steps, self.seed)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Check the model and set the schedule's length."""
        layers = moe_layers(model)
        if not layers:
            raise ConfigError(f"{type(model).__name__} has no MoE layers to schedule: call moefy(model, SMoEConfig(...)) first")
        self.schedule = self._schedule(state.max_steps if self.total_steps is None else self.total_steps)
        name, largest = max(layers, key=lambda pair: pair[1].num_experts)
        if self.schedule.k_max > largest.num_experts:
            raise ConfigError(f"k_max = {self.schedule.k_max} is more than the {largest.num_experts} experts of layer {name!r}")
        if args.label_smoothing_factor and any(layer.own_losses or getattr(layer.router, "balance_loss", 0) for _, layer in layers):
            raise ConfigError(
                f"label_smoothing_factor = {args.label_smoothing_factor}: the Trainer then computes the loss itself, without the "
                "auxiliary losses; leave it out, or set balance_loss=0"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Set k and the progress of this step."""
        set_top_k(model, self.schedule(state.global_step))
        set_progress(model, state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, model: nn.Module, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add `top_k` to the log entry."""
        k = get_top_k(model)
        for entry in (logs, state.log_history[-1] if state.log_history else None):
            if entry is not None:
                entry["top_k"] = k
