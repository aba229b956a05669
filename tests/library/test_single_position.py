"""Products of a single position: shapes, layouts of weights, and tensors that are kept between passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smoe_dropout as sd
from smoe_dropout.single_position import numbered, product


def model() -> nn.Module:
    """A model with one MoE layer."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    return sd.moefy(nn.Sequential(dense), sd.SMoEConfig(num_experts=4, top_k=2)).eval()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 8), (8, 2), (1, 8)])
def test_an_input_of_another_width_is_refused(shape):
    weight = torch.randn(6, 16)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        product(torch.randn(shape), weight)
    for other in (weight, weight.to_sparse_csr()):
        torch.testing.assert_close(product(torch.ones(1, 1, 32)[..., ::2], other), F.linear(torch.ones(1, 1, 16), weight))


@torch.no_grad()
@pytest.mark.parametrize("name", ["up", "down"])
def test_maps_may_lie_in_memory_in_any_order(name):
    made, x = model(), torch.randn(1, 16)
    expected, parameter = made(x), getattr(made[0].experts, name)
    parameter.data = parameter.data.transpose(0, 2).contiguous().transpose(0, 2)
    assert not parameter.is_contiguous()
    torch.testing.assert_close(made(x), expected)
    torch.testing.assert_close(sd.slim(made, 2)(x), expected)


@torch.no_grad()
def test_a_default_device_leaves_nothing_behind():
    made, x = model(), torch.randn(1, 16)
    numbered.cache_clear()
    with torch.device("meta"):
        numbered(4)
    assert all(tensor.is_cpu for tensor in numbered(4))
    assert made(x).is_cpu
