"""Queries, keys and values from experts: --attn_moe of arXiv 2303.01610's code, 16 top-1 experts in place of one linear map."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.options import ConfigError


class ExpertQueryKeyValue(nn.Module):
    """(x [B, T, D], memory [B, M, D]) -> queries of x [B, T, W], keys and values of x, keys and values of memory.

    A token's expert is the largest logit of a linear router. As in the official code the weight of the single chosen expert is its softmax
    over itself, 1, so no gradient reaches the router. weight [E, 3W, D], bias [E, 3W].
    """

    def __init__(self, dense: nn.Linear, num_experts: int, init_std: float):
        super().__init__()
        like, self.width = dense.weight, dense.out_features // 3
        self.weight = nn.Parameter(like.new_empty(num_experts, *like.shape).normal_(0.0, init_std))
        self.bias = nn.Parameter(like.new_zeros(num_experts, dense.out_features))
        self.router = nn.Linear(dense.in_features, num_experts).to(like.device, like.dtype).requires_grad_(False)
        nn.init.normal_(self.router.weight, 0.0, init_std)
        nn.init.zeros_(self.router.bias)

    def forward(self, x_BTD: Tensor, memory_BMD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        q, k, v = self.project(x_BTD, self.weight, self.bias).split(self.width, -1)
        kv_of_memory = self.project(memory_BMD, self.weight[:, self.width :], self.bias[:, self.width :]).split(self.width, -1)
        return q, (k, v), kv_of_memory

    def project(self, x: Tensor, weight_EWD: Tensor, bias_EW: Tensor) -> Tensor:
        """[..., D] -> [..., W], every token by its own expert."""
        x_ND = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            expert_N = self.router(x_ND.to(self.router.weight.dtype)).argmax(-1)
        order_N = expert_N.argsort(stable=True)
        counts = torch.bincount(expert_N, minlength=len(self.weight)).tolist()
        sorted_ND = x_ND[order_N].split(counts)
        parts = [F.linear(part, weight, bias) for part, weight, bias in zip(sorted_ND, weight_EWD, bias_EW, strict=True)]
        return torch.cat(parts)[order_N.argsort()].unflatten(0, x.shape[:-1])


def expert_attention(model: nn.Module, layers: list[int] | None, num_experts: int, init_std: float) -> nn.Module:
    """Makes the `qkv` of the attention modules experts, in place; of those in `layers` by order, or all. ConfigError if there are none."""
    found = [module for module in model.modules() if getattr(getattr(module, "qkv", None), "takes_memory", False)]
    if not found:
        raise ConfigError(f"{type(model).__name__} has no attention whose queries, keys and values, of memory too, are one map 'qkv'")
    for index, module in enumerate(found):
        if layers is None or index in layers:
            module.qkv = ExpertQueryKeyValue(module.qkv, num_experts, init_std)
    return model
