"""Schedule of k as a callback of transformers' Trainer. Importing this module imports transformers."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from smoe_dropout.arguments import integer, shown
from smoe_dropout.control import expert_load, get_top_k, mean_k, moe_layers, set_top_k
from smoe_dropout.options import ConfigError
from smoe_dropout.schedule import TopKSchedule
from smoe_dropout.selection import overridden, selected
from smoe_dropout.training import set_progress


class TopKScheduleCallback(TrainerCallback):
    """Set k and the training progress before every optimiser step.

    mode: of `TopKSchedule(mode, k_min, k_max, total_steps, seed)`, or a function from the step, counted from 0, to k, which takes none of
    the other settings. total_steps: length of the schedule; None: that of training. evaluate_at: k of evaluations during training; None:
    that of the preceding step, with which evaluations at different steps are not comparable.

    k depends on the global step only, so resumed runs continue exactly and all micro-batches of a step share one k. After training k stays
    at its last value; change it with `set_top_k` or `top_k`. A block of `top_k` or `top_p` around training takes precedence, which is
    warned of. Every entry of the Trainer's log history and of its loggers, such as TensorBoard, has `top_k`, the mean of the last pass
    where it differs, and of the expert load of this process's last pass, as means over layers, `expert_entropy`, its entropy from 0 for a
    single expert to 1 for equal loads, and `expert_load_max`, that of the busiest expert as a multiple of an equal one; evaluations have
    them in the loggers with `eval_` in front.

    Raises ConfigError for an invalid schedule, and at the start of training for a model without MoE layers, k_max or evaluate_at
    above the number of experts, or label smoothing, with which the Trainer computes the loss without the auxiliary losses.
    """

    def __init__(
        self,
        mode: str | Callable[[int], int],
        k_min: int | None = None,
        k_max: int | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        evaluate_at: int | None = None,
    ):
        if callable(mode) and (k_min, k_max, total_steps, seed) != (None, None, None, 0):
            raise ConfigError("a schedule that is a function takes neither k_min, k_max, total_steps nor seed: leave them out")
        if not callable(mode) and None in (k_min, k_max):
            raise ConfigError(f"the schedule {shown(mode)} needs k_min and k_max")
        total_steps = None if total_steps is None else integer("total_steps", total_steps, 1, None)
        evaluate_at = None if evaluate_at is None else integer("evaluate_at", evaluate_at)
        self.settings, self.total_steps, self.seed, self.evaluate_at = (mode, k_min, k_max), total_steps, seed, evaluate_at
        self.training_k: dict[str, int] | None = None  # during an evaluation, by layer
        self.hook: RemovableHandle | None = None
        self.schedule = self._schedule(total_steps or 1)  # raises for an invalid schedule now, not when training starts

    def _schedule(self, total_steps: int) -> Callable[[int], int]:
        return self.settings[0] if callable(self.settings[0]) else TopKSchedule(*self.settings, total_steps, self.seed)

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move before the loggers."""
        run_before_loggers(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Check the model and set the schedule's length."""
        run_before_loggers(self)
        layers = moe_layers(model)
        if not layers:
            raise ConfigError(f"{type(model).__name__} has no MoE layers to schedule: call moefy(model, SMoEConfig(...)) first")
        self.schedule = self._schedule(state.max_steps if self.total_steps is None else self.total_steps)
        name, largest = max(layers, key=lambda pair: pair[1].num_experts)
        for what, k in (("k_max", self.settings[2]), ("evaluate_at", self.evaluate_at)):
            if k is not None and k > largest.num_experts:
                raise ConfigError(f"{what} = {k} is more than the {largest.num_experts} experts of layer {name!r}")
        if args.label_smoothing_factor and any(layer.own_losses or getattr(layer.router, "balance_loss", 0) for _, layer in layers):
            raise ConfigError(
                f"label_smoothing_factor = {args.label_smoothing_factor}: the Trainer then computes the loss itself, without the "
                "auxiliary losses; leave it out, or set balance_loss=0"
            )
        if any(overridden(layer) for _, layer in layers):
            warnings.warn(
                "train() runs inside a block of top_k or top_p, whose k holds in every pass: the schedule and evaluate_at only change the "
                "default k, which is saved; leave the block first",
                stacklevel=2,
            )
        if self.evaluate_at is not None:
            self.hook = model.register_forward_pre_hook(self._before_pass)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave later evaluations alone."""
        if self.hook is not None:
            self.hook.remove()
            self.hook = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Set k and the progress of this step."""
        self.training_k = None
        set_top_k(model, self.schedule(state.global_step))
        set_progress(model, state.global_step, state.max_steps)

    def _before_pass(self, model: nn.Module, _inputs: tuple) -> None:
        """Set the k of evaluations, of which the Trainer announces only the end."""
        if not model.training and self.training_k is None:
            self.training_k = {name: layer.default_k for name, layer in moe_layers(model)}
            set_top_k(model, self.evaluate_at)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        """Restore the k of training."""
        if self.training_k is not None:
            set_top_k(model, self.training_k)
            self.training_k = None

    def on_log(self, args: Any, state: Any, control: Any, model: nn.Module, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add k, and entropy and maximum of the expert load, to the log entry."""
        logs = {} if logs is None else logs
        prefix = "eval_" if any(name.startswith("eval_") for name in logs) else ""
        values = {"top_k": used_k(model), **load_statistics(model)}
        logs |= {prefix + name: value for name, value in values.items()}
        if state.log_history:
            state.log_history[-1] |= values


def used_k(model: nn.Module) -> float:
    """k, or its mean over the last pass and all layers where it differs between layers, rows or tokens."""
    if all(isinstance(selected(layer), int) for _, layer in moe_layers(model)) and isinstance(k := get_top_k(model), int):
        return k
    means = mean_k(model).values()
    return sum(means) / len(means) if means else math.nan


def load_statistics(model: nn.Module) -> dict[str, float]:
    """Statistics of the expert load of the last pass, means over layers; empty if no layer has run.

    expert_entropy: its entropy divided by the maximum, log E. expert_load_max: the largest load times E, 1 for equal loads.
    """
    loads = [load for load in expert_load(model).values() if len(load) > 1]
    if not loads:
        return {}
    entropies = torch.stack([torch.special.entr(load).sum() / math.log(len(load)) for load in loads])
    largest = torch.stack([load.max() * len(load) for load in loads])
    return {"expert_entropy": entropies.mean().item(), "expert_load_max": largest.mean().item()}


def run_before_loggers(callback: TrainerCallback) -> None:
    """Move the callback behind the first of the Trainer's callbacks, so that loggers, which transformers puts first, see what it adds.

    The list belongs to the handler that is calling the callback, which does not pass itself.
    """
    frame = inspect.currentframe()
    while frame is not None and not isinstance(handler := frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None and callback in handler.callbacks[2:]:
        handler.callbacks.remove(callback)
        handler.callbacks.insert(1, callback)
