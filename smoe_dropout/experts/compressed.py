"""Experts whose maps are W = U V + S: a product of low rank, and all of W's rest for some hidden units only (LoSparse, arXiv 2306.11222;
of experts MC-SMoE, arXiv 2310.01334, section 3.3).

Besides the shape suffixes of the package: G maps of one kind, 2 of a gated expert's up, else 1; R rank; U hidden units that S has.
"""

import torch
from torch import Tensor, nn

from smoe_dropout.experts import Experts
from smoe_dropout.experts.activations import ACTIVATIONS


class CompressedExperts(Experts):
    """Computed as other experts are, with weights composed of their factors in every pass, which costs as much however few the tokens are.
    U V of new ones is zero.

    rank: of every map's U V. sparse_units: hidden units for which S has rows, of up and down alike; `units` [E, U] says which.
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
        del self.up, self.down  # from here on composed
        E, D, H, R, U = num_experts, d_model, d_expert, rank, sparse_units
        for name, G in (("up", ACTIVATIONS[activation].width), ("down", 1)):
            self.register_parameter(f"{name}_u", nn.Parameter(torch.zeros(E, G, H, R)))
            self.register_parameter(f"{name}_v", nn.Parameter(torch.empty(E, G, R, D).normal_(0.0, init_std)))
            self.register_parameter(f"{name}_s", nn.Parameter(torch.empty(E, G, U, D).normal_(0.0, init_std)))
        self.register_buffer("units", torch.arange(U).expand(E, U).clone())

    @property
    def up(self) -> Tensor:
        return composed(self.up_u, self.up_v, self.up_s, self.units)

    @property
    def down(self) -> Tensor:
        return composed(self.down_u, self.down_v, self.down_s, self.units)

    @torch.no_grad()
    def keep_units(self, places_EU: Tensor) -> None:
        """Leaves S the rows in these places of each expert. The parameters change: build their optimiser afterwards."""
        for name in ("up_s", "down_s"):
            rows = getattr(self, name)
            kept = rows.gather(2, places_EU[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
            setattr(self, name, nn.Parameter(kept, rows.requires_grad))
        self.units = self.units.gather(1, places_EU)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.up_v.shape[2]}, sparse_units={self.units.shape[1]}"


def sparse_units(d_expert: int, share: float) -> int:
    """Hidden units that this share of S has."""
    return max(1, round(share * d_expert))


def composed(u_EGHR: Tensor, v_EGRD: Tensor, s_EGUD: Tensor, units_EU: Tensor) -> Tensor:
    """U V + S as stacked maps [E, G * H, D], in the precision of the factors."""
    with torch.autocast(u_EGHR.device.type, enabled=False):
        places_EGUD = units_EU[:, None, :, None].expand_as(s_EGUD)
        return (u_EGHR @ v_EGRD).scatter_add(2, places_EGUD, s_EGUD).flatten(1, 2)


@torch.no_grad()
def factored(experts: Experts, rank: int) -> CompressedExperts:
    """The same experts with U V the nearest maps of that rank and S all that is left."""
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
            getattr(made, parameter).copy_(tensor)
    return made.requires_grad_(experts.bias_up.requires_grad)
