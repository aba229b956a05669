"""Alignment of hidden units, and clustering of experts."""

import pytest
import torch

from smoe_dropout.experts import Experts
from smoe_dropout.surgery.alignment import aligned, permuted
from smoe_dropout.surgery.clustering import spectral_clusters
from smoe_dropout.surgery.groups import Expert, expert_of

ACTIVATIONS = ["relu", "gelu", "silu_gated"]


def random_experts(activation: str, count: int = 2) -> Experts:
    torch.manual_seed(0)
    experts = Experts(count, 6, 24, activation, 0.0, "reference", 0.5).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    return experts.requires_grad_(False)


def outputs(experts: Experts, expert: Expert, x_ND: torch.Tensor) -> torch.Tensor:
    """Outputs of a single expert, copied to index 0."""
    for parameter, tensor in zip((experts.up, experts.bias_up, experts.down, experts.bias_down), expert, strict=True):
        parameter[0] = tensor
    return experts.each(x_ND)[:, 0].clone()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_permuting_hidden_units_does_not_change_the_function(activation):
    experts, order_H, x_ND = random_experts(activation), torch.randperm(24), torch.randn(5, 6).double()
    before, other = experts.each(x_ND)[:, 0].clone(), permuted(expert_of(experts, 0), order_H)
    assert not torch.equal(other.up_HD, experts.up[0])
    torch.testing.assert_close(outputs(experts, other, x_ND), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_alignment_undoes_a_permutation_exactly(activation):
    expert = expert_of(random_experts(activation), 0)
    found = aligned(permuted(expert, torch.randperm(24)), to=expert)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expert, strict=True))


@pytest.mark.parametrize("part", ["up_HD", "bias_up_H", "down_HD"])
def test_each_map_alone_identifies_the_units(part):
    """The other parts are identical for all units."""
    expert = Expert(torch.ones(8, 3), torch.ones(8), torch.ones(8, 3), torch.ones(3))
    expert = expert._replace(**{part: torch.arange(getattr(expert, part).numel()).float().view_as(getattr(expert, part))})
    assert torch.equal(getattr(aligned(permuted(expert, torch.randperm(8)), to=expert), part), getattr(expert, part))


def test_alignment_reduces_the_distance_to_another_expert():
    one, other = (expert_of(random_experts("relu"), index) for index in (0, 1))
    distance = [(found.up_HD - one.up_HD).norm() for found in (other, aligned(other, to=one))]
    assert distance[1] < 0.95 * distance[0]


BLOCKS = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2), torch.ones(1, 1))


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_clusters_are_the_blocks_of_the_affinity(noise):
    torch.manual_seed(0)
    order = torch.randperm(6)
    affinity = (BLOCKS + noise * torch.rand(6, 6))[order][:, order]
    found = spectral_clusters((affinity + affinity.T) / 2, 3)
    assert sorted(sorted(order[list(members)].tolist()) for members in found) == [[0, 1, 2], [3, 4], [5]]


@pytest.mark.parametrize("affinity", [torch.eye(6), torch.ones(6, 6), torch.zeros(6, 6), BLOCKS], ids=["eye", "ones", "zeros", "blocks"])
@pytest.mark.parametrize("count", range(1, 7))
def test_number_of_clusters_is_exact_and_the_seed_determines_them(affinity, count):
    found = spectral_clusters(affinity, count, seed=3)
    assert len(found) == count and all(found) and sorted(sum(found, ())) == list(range(6))
    assert found == spectral_clusters(affinity, count, seed=3)
