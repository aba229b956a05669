"""MC-SMoE's compression (arXiv 2310.01334, section 3.3; LoSparse, 2306.11222): W = U V + S in every expert.

S is pruned during training with distillation from a teacher, and with frozen routers:

    compressed = compress(model, rank=32)
    pruner = Pruner(compressed, kept=0.1, steps=1000)
    for step in range(steps):
        loss = distilled(task_loss, logits, teacher_logits); loss.backward(); optimizer.step()
        pruner.step()                       # before the gradients are cleared
        optimizer.zero_grad()
    pruner.finish()                         # removes pruned weights from storage, if whole hidden units were pruned
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.arguments import integer, is_finite, require_weights, shown
from smoe_dropout.control import configure, moe_layers, only_conversion
from smoe_dropout.experts.compressed import CompressedExperts, factored, sparse_units
from smoe_dropout.options import require
from smoe_dropout.registry import unknown
from smoe_dropout.surgery.calibration import require_finite

BETA = 0.85  # decay of the running mean of importances (LoSparse)
BY = ("rows", "units")
WARM_UP = 50  # steps, in the scripts of MC-SMoE


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


def kept_share(step: int, steps: int, final: float, warm_up: int = 0) -> float:
    """Fraction left in S after a step: 1 during `warm_up` steps, `final` in the last four times as many, and between them a cubic schedule
    from 1 to `final`, fastest at the start.
    """
    if step <= warm_up:
        return 1.0
    return final + (1 - final) * (1 - min((step - warm_up) / max(steps - 5 * warm_up, 1), 1.0)) ** 3


class Pruner:
    """Gradually zeroes the least important rows of S, by a running mean of |w dL/dw|.

    kept: final fraction of S. steps: length of the schedule. by: "rows", as the code of MC-SMoE (LoSparse's pruner): one threshold over the
    rows of all maps of all experts and layers, a row being a hidden unit of the first map or an output of the second, so that experts keep
    as much as they matter; the importance is that of the steps before, and nothing is pruned in the first 50 steps (at most a twentieth of
    all), and no more than `kept` is left in the last 200. "units": the same number of hidden units of every expert, in both maps, without
    such phases; `finish` then removes them from storage. Save and load its state when training is resumed.

    Raises ConfigError for a model without compressed experts, `kept` above what S has left, an unknown `by`, or steps < 1.
    """

    def __init__(self, model: nn.Module, kept: float, steps: int, by: str = "rows"):
        self.model, self.kept, self.steps, self.taken = model, _checked_share(kept), integer("steps", steps, 1, None), 0
        require(isinstance(by, str) and by in BY, unknown("value of by", str(by), list(BY)))
        self._experts = [layer.experts for _, layer in moe_layers(model) if isinstance(layer.experts, CompressedExperts)]
        require(bool(self._experts), f"{type(model).__name__} has no compressed experts: call compress(model, rank) first")
        share = moe_layers(model)[0][1].config.sparse_share
        require(kept <= share, f"kept = {kept} is more than the share {share} of hidden units that S has left")
        self.by, measure = by, _importance if by == "units" else _importance_of_rows
        self._measure = measure
        self.importances = [torch.zeros_like(tensor) for experts in self._experts for tensor in measure(experts, of_weights=True)]
        self.latest = [torch.zeros_like(tensor) for tensor in self.importances] if by == "rows" else []

    @torch.no_grad()
    def step(self) -> None:
        """Prune; call it after each optimiser step, before gradients are cleared."""
        self.taken += 1
        found = [self._measure(experts) if experts.up_s.grad is not None else None for experts in self._experts]
        (self._prune_rows if self.by == "rows" else self._prune_units)(found)

    def _prune_rows(self, found: list[tuple[Tensor, ...] | None]) -> None:
        for importance, latest in zip(self.importances, self.latest, strict=True):
            importance.lerp_(latest, 1 - BETA)
        for place, new in enumerate(found):
            for latest, tensor in zip(self.latest[2 * place : 2 * place + 2], new or (), strict=new is not None):
                latest.copy_(tensor)
        share = kept_share(self.taken - 1, self.steps, self.kept, min(WARM_UP, self.steps // 20))
        if share == 1:
            return
        threshold = self._threshold(share)
        for place, experts in enumerate(self._experts):
            up_EGU, down_ED = self.importances[2 * place : 2 * place + 2]
            experts.up_s.masked_fill_((up_EGU < threshold)[..., None], 0)
            experts.down_s.masked_fill_((down_ED < threshold)[:, None, None], 0)

    def _threshold(self, share: float) -> Tensor:
        """The importance below which this share of the weights of S is kept."""
        widths = [tensor.shape[at] for experts in self._experts for tensor, at in ((experts.up_s, 3), (experts.down_s, 2))]
        values_R = torch.cat([importance.flatten() for importance in self.importances])
        width_R = torch.cat([torch.full((each.numel(),), width) for each, width in zip(self.importances, widths, strict=True)])
        order_R = values_R.cpu().argsort()
        reached_R = width_R[order_R].cumsum(0)  # weights up to each row, from the least important
        pruned = int(int(reached_R[-1]) * (1 - share))
        return values_R[order_R[int((reached_R < max(pruned, 1)).sum())]]

    def _prune_units(self, found: list[tuple[Tensor, ...] | None]) -> None:
        share = kept_share(self.taken, self.steps, self.kept)
        for experts, importance_EU, new in zip(self._experts, self.importances, found, strict=True):
            if new is not None:
                importance_EU.lerp_(new[0], 1 - BETA)
            kept = min(sparse_units(experts.up_u.shape[2], share), importance_EU.shape[1])
            pruned_EU = torch.ones_like(importance_EU, dtype=torch.bool).scatter_(1, importance_EU.topk(kept).indices, False)
            for rows_EGUD in (experts.up_s, experts.down_s):
                rows_EGUD.masked_fill_(pruned_EU[:, None, :, None], 0)

    def finish(self) -> None:
        """Remove pruned hidden units from S; rows of single maps stay, as zeros, which no count of parameters includes.

        Build the optimiser afterwards, since the parameters change.
        """
        if self.by == "units":
            _keep(self.model, self.importances, self.kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors to save with a checkpoint."""
        kinds = {"importance": self.importances, "latest": self.latest}
        tensors = {f"{name}.{index}": tensor for name, its in kinds.items() for index, tensor in enumerate(its)}
        return {"taken": torch.tensor(self.taken), **tensors}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`. ConfigError for the state of a pruner of another kind, as earlier versions had (by="units")."""
        own = self.state_dict()
        fits = state.keys() == own.keys() and all(state[name].shape == own[name].shape for name in own)
        require(fits, f"the state is that of another pruner than by={self.by!r}: make one with {' or '.join(map(repr, BY))} as it was")
        self.taken = int(state["taken"])
        for name, tensor in own.items():
            if name != "taken":
                tensor.copy_(state[name])


def distilled(
    task_loss: Tensor, logits: Tensor, teacher_logits: Tensor, alpha: float = 0.2, temperature: float = 2.0, squared: bool = False
) -> Tensor:
    """task_loss + alpha KL(teacher || model) at temperature T, averaged over positions; logits [..., V].

    squared: times T^2, which keeps the size of its gradient (Hinton et al. 2015, arXiv 1503.02531); MC-SMoE's code does not.
    """
    ours, theirs = ((some.flatten(0, -2) / temperature).log_softmax(-1) for some in (logits, teacher_logits))
    weight = alpha * temperature**2 if squared else alpha
    return task_loss + weight * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _importance(experts: CompressedExperts, of_weights: bool = False) -> tuple[Tensor]:
    """Mean |w dL/dw| of each hidden unit of S [E, U]. of_weights: mean |w| instead, for its shape."""
    products = [_product(rows, of_weights).transpose(1, 2).flatten(2) for rows in (experts.up_s, experts.down_s)]
    return (torch.cat(products, 2).mean(2),)


def _importance_of_rows(experts: CompressedExperts, of_weights: bool = False) -> tuple[Tensor, Tensor]:
    """Mean |w dL/dw| of each row of S: of the first map's hidden units [E, G, U], and of the second's outputs [E, D]."""
    return _product(experts.up_s, of_weights).mean(3), _product(experts.down_s, of_weights).mean((1, 2))


def _product(weights: Tensor, of_weights: bool) -> Tensor:
    return weights.detach().abs() if of_weights else (weights * weights.grad).abs()


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
