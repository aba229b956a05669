"""MC-SMoE's compression (arXiv 2310.01334, section 3.3; LoSparse, 2306.11222): W = U V + S in every expert.

S is pruned during training with distillation from a teacher:

    compressed = compress(model, rank=32)
    pruner = Pruner(compressed, kept=0.1, steps=1000)
    for step in range(steps):
        loss = distilled(task_loss, logits, teacher_logits); loss.backward(); optimizer.step()
        pruner.step()                       # before the gradients are cleared
        optimizer.zero_grad()
    pruner.finish()                         # removes pruned weights from storage
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.arguments import integer, is_finite, require_weights, shown
from smoe_dropout.control import configure, moe_layers, only_conversion
from smoe_dropout.experts.compressed import CompressedExperts, factored, sparse_units
from smoe_dropout.options import require
from smoe_dropout.surgery.calibration import require_finite

BETA = 0.85  # decay of the running mean of importances (LoSparse)


def compress(model: nn.Module, rank: int, kept: float = 1.0) -> nn.Module:
    """Copy of the model with experts U V + S, U V of the given rank. With kept = 1 it computes the same function.

    kept: fraction of hidden units to keep in S now, those with the largest norm; use a `Pruner` to remove them gradually in training.
    Raises ConfigError for a model without experts or with compressed ones, and for an invalid rank or fraction.
    """
    layers = moe_layers(model)
    require(bool(layers), f"{type(model).__name__} has no MoE layers: there are no experts to compress")
    require(only_conversion(model).expert_rank is None, "the experts are already compressed")
    require_weights(model)
    most = min(min(layer.experts.down.shape[1:]) for _, layer in layers)
    rank, kept = integer("rank", rank, None, None), _checked_share(kept)
    require(1 <= rank <= most, f"rank = {shown(rank)} must be from 1 to {most}, the largest rank of an expert's maps")
    require_finite([layer for _, layer in layers])
    made = copy.deepcopy(model)
    for _, layer in moe_layers(made):
        layer.experts = factored(layer.experts, rank)
    width = {"d_expert": layers[0][1].experts.down.shape[1]} if layers[0][1].config.expert_init == "copy" else {}
    configure(made, expert_rank=rank, expert_init="fresh", **width)
    if kept < 1:
        _keep(made, [_size(layer.experts) for _, layer in moe_layers(made)], kept)
    return made


def kept_share(step: int, steps: int, final: float) -> float:
    """Fraction of hidden units left in S after a step: a cubic schedule from 1 to `final` over `steps`, fastest at the start."""
    return final + (1 - final) * (1 - min(step / steps, 1.0)) ** 3


class Pruner:
    """Gradually zeroes the least important hidden units of S, by a running mean of |w dL/dw|.

    kept: final fraction of hidden units in S. steps: length of the schedule. Save and load its state when training is resumed. Raises
    ConfigError for a model without compressed experts, `kept` above what S has left, or steps < 1.
    """

    def __init__(self, model: nn.Module, kept: float, steps: int):
        self.model, self.kept, self.steps, self.taken = model, _checked_share(kept), integer("steps", steps, 1, None), 0
        self._experts = [layer.experts for _, layer in moe_layers(model) if isinstance(layer.experts, CompressedExperts)]
        require(bool(self._experts), f"{type(model).__name__} has no compressed experts: call compress(model, rank) first")
        share = moe_layers(model)[0][1].config.sparse_share
        require(kept <= share, f"kept = {kept} is more than the share {share} of hidden units that S has left")
        self.importances = [torch.zeros_like(experts.units, dtype=experts.up_s.dtype) for experts in self._experts]

    @torch.no_grad()
    def step(self) -> None:
        """Prune; call it after each optimiser step, before gradients are cleared."""
        self.taken += 1
        share = kept_share(self.taken, self.steps, self.kept)
        for experts, importance_EU in zip(self._experts, self.importances, strict=True):
            if experts.up_s.grad is not None:
                importance_EU.lerp_(_importance(experts), 1 - BETA)
            kept = min(sparse_units(experts.up_u.shape[2], share), importance_EU.shape[1])
            pruned_EU = torch.ones_like(importance_EU, dtype=torch.bool).scatter_(1, importance_EU.topk(kept).indices, False)
            for rows_EGUD in (experts.up_s, experts.down_s):
                rows_EGUD.masked_fill_(pruned_EU[:, None, :, None], 0)

    def finish(self) -> None:
        """Remove the pruned hidden units from S. Build the optimiser afterwards, since the parameters change."""
        _keep(self.model, self.importances, self.kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to save with a checkpoint."""
        return {"taken": torch.tensor(self.taken), **{f"importance.{i}": tensor for i, tensor in enumerate(self.importances)}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.taken = int(state["taken"])
        for index, importance_EU in enumerate(self.importances):
            importance_EU.copy_(state[f"importance.{index}"])


def distilled(
    task_loss: Tensor, logits: Tensor, teacher_logits: Tensor, alpha: float = 0.2, temperature: float = 2.0, squared: bool = False
) -> Tensor:
    """task_loss + alpha KL(teacher || model) at temperature T, averaged over positions; logits [..., V].

    squared: times T^2, which keeps the size of its gradient (Hinton et al. 2015, arXiv 1503.02531); MC-SMoE's code does not.
    """
    ours, theirs = ((some.flatten(0, -2) / temperature).log_softmax(-1) for some in (logits, teacher_logits))
    weight = alpha * temperature**2 if squared else alpha
    return task_loss + weight * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _importance(experts: CompressedExperts) -> Tensor:
    """Mean |w dL/dw| of each hidden unit of S [E, U]."""
    products = [(rows * rows.grad).abs().transpose(1, 2).flatten(2) for rows in (experts.up_s, experts.down_s)]
    return torch.cat(products, 2).mean(2)


def _size(experts: CompressedExperts) -> Tensor:
    """Squared norm of each hidden unit of S [E, U]."""
    return sum(rows.detach().square().sum((1, 3)) for rows in (experts.up_s, experts.down_s))


def _keep(model: nn.Module, importances: list[Tensor], share: float) -> None:
    """Keep this fraction of hidden units in S of every expert, the most important ones."""
    for (_, layer), importance_EU in zip(moe_layers(model), importances, strict=True):
        kept = importance_EU.topk(sparse_units(layer.experts.up_u.shape[2], share)).indices
        layer.experts.keep_units(kept.sort(1).values)
    configure(model, sparse_share=share)


def _checked_share(kept: float) -> float:
    require(is_finite(kept) and 0 < kept <= 1, f"kept = {shown(kept)} must be a number above 0 and at most 1")
    return float(kept)
