"""Experts with compressed maps W = U V + S, U V of low rank and S nonzero for some hidden units only.

LoSparse, arXiv 2306.11222; for experts MC-SMoE, arXiv 2310.01334, section 3.3. Shape suffixes besides the package's: G maps stacked in
one, 2 for a gated expert's up and 1 otherwise; R rank; U hidden units in S.
"""

import torch
from torch import Tensor, nn

from smoe_dropout.config import SMoEConfig
from smoe_dropout.experts import Experts
from smoe_dropout.experts.activations import ACTIVATIONS


class CompressedExperts(Experts):
    """Experts whose weights are composed from their factors in every pass, at a cost that does not depend on the number of tokens.

    rank: rank of U V in every map. sparse_units: number of hidden units in S, the same for up and down; `units` [E, U] holds their indices.
    Fresh experts have U V = 0.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_expert: int,
        activation: str,
        dropout: float,
        backend: str,
        init_std: float,
        rank: int,
        sparse_units: int,
    ):
        super().__init__(num_experts, d_model, d_expert, activation, dropout, backend, init_std)
        del self.up, self.down  # replaced by properties that compose them
        E, D, H, R, U = num_experts, d_model, d_expert, rank, sparse_units
        for name, G in (("up", ACTIVATIONS[activation].width), ("down", 1)):
            self.register_parameter(f"{name}_u", nn.Parameter(torch.zeros(E, G, H, R)))
            self.register_parameter(f"{name}_v", nn.Parameter(torch.empty(E, G, R, D).normal_(0.0, init_std)))
            self.register_parameter(f"{name}_s", nn.Parameter(torch.empty(E, G, U, D).normal_(0.0, init_std)))
        self.register_buffer("units", torch.arange(U).expand(E, U).clone())

    @property
    def up(self) -> Tensor:
        """Composed map, shaped as in `Experts`."""
        return composed(self.up_u, self.up_v, self.up_s, self.units)

    @property
    def down(self) -> Tensor:
        """Composed map, shaped as in `Experts`."""
        return composed(self.down_u, self.down_v, self.down_s, self.units)

    @torch.no_grad()
    def keep_units(self, places_EU: Tensor) -> None:
        """Reduce S to its rows at these positions, per expert. Build the optimiser afterwards, since the parameters change."""
        for name in ("up_s", "down_s"):
            rows = getattr(self, name)
            kept = rows.gather(2, places_EU[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
            setattr(self, name, nn.Parameter(kept, rows.requires_grad))
        self.units = self.units.gather(1, places_EU)

    def extra_repr(self) -> str:
        """Sizes and settings, for `print(model)`."""
        return f"{super().extra_repr()}, rank={self.up_v.shape[2]}, sparse_units={self.units.shape[1]}"


def experts_of(config: SMoEConfig, d_model: int, d_expert: int, activation: str, dropout: float) -> Experts:
    """Fresh experts of the kind that the configuration asks for."""
    sizes = (config.num_experts, d_model, d_expert, activation, dropout, config.backend, config.init_std)
    if config.expert_rank is None:
        return Experts(*sizes)
    return CompressedExperts(*sizes, config.expert_rank, sparse_units(d_expert, config.sparse_share))


def sparse_units(d_expert: int, share: float) -> int:
    """Number of hidden units in S at this fraction."""
    return max(1, round(share * d_expert))


def composed(u_EGHR: Tensor, v_EGRD: Tensor, s_EGUD: Tensor, units_EU: Tensor) -> Tensor:
    """Stacked maps U V + S [E, G * H, D], in the precision of the factors."""
    with torch.autocast("cpu" if u_EGHR.is_meta else u_EGHR.device.type, enabled=False):  # the meta device has no autocast
        places_EGUD = units_EU[:, None, :, None].expand_as(s_EGUD)
        return (u_EGHR @ v_EGRD).scatter_add(2, places_EGUD, s_EGUD).flatten(1, 2)


@torch.no_grad()
def factored(experts: Experts, rank: int) -> CompressedExperts:
    """Factor experts by SVD: U V is the best approximation of that rank and S the remainder, so the function does not change."""
    E, H, D = experts.down.shape
    made = CompressedExperts(E, D, H, experts.activation, experts.dropout, experts.backend, 0.0, rank, H)
    made.to(experts.up.device, experts.up.dtype).train(experts.training)
    for name in ("up", "down"):
        stacked = getattr(experts, name)
        maps_EGHD = stacked.double().unflatten(1, (-1, H))
        left, values, right = torch.linalg.svd(maps_EGHD, full_matrices=False)
        roots = values[..., :rank].sqrt()
        u, v = left[..., :rank] * roots[..., None, :], right[..., :rank, :] * roots[..., None]
        filled = {f"{name}_u": u, f"{name}_v": v, f"{name}_s": maps_EGHD - u @ v, f"bias_{name}": getattr(experts, f"bias_{name}")}
        for parameter, tensor in filled.items():
            trained = getattr(experts, f"bias_{name}" if parameter.startswith("bias") else name).requires_grad
            getattr(made, parameter).requires_grad_(trained).copy_(tensor)
    return made
