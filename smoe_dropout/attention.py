"""Attention projections from experts: --attn_moe of arXiv 2303.01610's code, 16 top-1 experts in place of one linear map."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.options import ConfigError


class ExpertQueryKeyValue(nn.Module):
    """(x [B, T, D], memory [B, M, D]) -> queries of x [B, T, W], keys and values of x, keys and values of memory.

    A linear router assigns each token the expert of its largest logit. As in the official code the gate weight is the softmax over that
    single logit, 1, so no gradient reaches the router. weight [E, 3W, D], bias [E, 3W].
    """

    def __init__(self, dense: nn.Linear, num_experts: int, init_std: float):
        super().__init__()
        old, self.width = dense.weight, dense.out_features // 3
        self.weight = nn.Parameter(old.new_empty(num_experts, *old.shape).normal_(0.0, init_std))
        self.bias = nn.Parameter(old.new_zeros(num_experts, dense.out_features))
        self.router = nn.Linear(dense.in_features, num_experts).to(old.device, old.dtype).requires_grad_(False)
        nn.init.normal_(self.router.weight, 0.0, init_std)
        nn.init.zeros_(self.router.bias)

    def forward(self, x_BTD: Tensor, memory_BMD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """x [B, T, D], memory [B, M, D] -> q [B, T, W], (k, v) of x, (k, v) of memory."""
        q, k, v = self.project(x_BTD, self.weight, self.bias).split(self.width, -1)
        kv_of_memory = self.project(memory_BMD, self.weight[:, self.width :], self.bias[:, self.width :]).split(self.width, -1)
        return q, (k, v), kv_of_memory

    def project(self, x: Tensor, weight_EWD: Tensor, bias_EW: Tensor) -> Tensor:
        """[..., D] -> [..., W], each token by its expert."""
        x_ND = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            expert_N = self.router(x_ND.to(self.router.weight.dtype)).argmax(-1)
        order_N = expert_N.argsort(stable=True)
        counts = torch.bincount(expert_N, minlength=len(self.weight)).tolist()
        sorted_ND = x_ND[order_N].split(counts)
        parts = [F.linear(part, weight, bias) for part, weight, bias in zip(sorted_ND, weight_EWD, bias_EW, strict=True)]
        return torch.cat(parts)[order_N.argsort()].unflatten(0, x.shape[:-1])


def expert_attention(model: nn.Module, layers: list[int] | None, num_experts: int, init_std: float) -> nn.Module:
    """Replace the `qkv` projection of attention modules with experts, in place: those with an index in `layers`, or all.

    Raises ConfigError if the model has no such projection.
    """
    found = [module for module in model.modules() if getattr(getattr(module, "qkv", None), "takes_memory", False)]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no attention module with one projection 'qkv' for inputs and memory")
    for index, module in enumerate(found):
        if layers is None or index in layers:
            module.qkv = ExpertQueryKeyValue(module.qkv, num_experts, init_std)
    return model
