"""The formulas for operations and parameters against torch's own counter and a count by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import smoe_dropout as sd
from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout.experts import sorted as sorted_experts
from utils.models.flops import active_parameters, parameter_counts
from utils.models.registry import Shape
from utils.models.transformer_xl import forward_flops

SIZES = {"n_token": 13, "n_layer": 3, "n_head": 2, "d_model": 12, "d_head": 5, "d_inner": 24, "mem_len": 7}
E, D, H = 4, SIZES["d_model"], SIZES["d_inner"] // 4
SPARSE = {"dense": None, "all_layers": {}, "one_layer": {"layers": (1,)}, "wide_experts": {"d_expert": 10}}


def build(sparse: dict | None, backend="reference", **sizes) -> MemTransformerLM:
    model = MemTransformerLM(TransformerXLConfig(**{**SIZES, **sizes})).eval()
    return model if sparse is None else sd.moefy(model, sd.SMoEConfig(E, 2, backend=backend, **sparse))


def counted(model: MemTransformerLM, batch: int, segment: int, memory: int) -> int:
    tokens = torch.zeros(batch, segment, dtype=torch.int64)
    state = tuple(torch.randn(batch, memory, D) for _ in range(SIZES["n_layer"] + 1))
    # the counter knows baddbmm, but not its in-place form
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2]}
    # without gradients a single position is computed by sums over rows, which the counter does not know
    with torch.set_grad_enabled(segment == 1), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(tokens, tokens, state)
    return counter.get_total_flops()


LENGTHS = [(1, 1, 0), (3, 4, 7), (2, 9, 3)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_forward_flops_of_the_dense_model(lengths):
    model = build(None)
    assert forward_flops(model, Shape(*lengths), None) == counted(model, *lengths)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "sorted"])
@pytest.mark.parametrize("sparse", ["all_layers", "one_layer", "wide_experts"])
def test_forward_flops_at_each_k(sparse, backend, lengths, monkeypatch):
    monkeypatch.setattr(sorted_experts, "ROWS", {})  # a test before this one may have called tune_cpu; rows of zeros are not counted
    model = build(SPARSE[sparse], backend)
    formula = {k: forward_flops(model, Shape(*lengths), k) for k in (1, 2, 4)}  # whatever k the model has at the moment
    for k, flops in formula.items():
        with sd.top_k(model, k):
            assert flops == forward_flops(model, Shape(*lengths), None) == counted(model, *lengths)
    assert len(set(formula.values())) == 3


@pytest.mark.parametrize(
    "sizes", [{"tie_weight": False}, {"pre_lnorm": True}, {"same_length": True, "clamp_len": 2}, {"n_head": 3}], ids=str
)
def test_forward_flops_of_other_shapes(sizes):
    model = build({}, **sizes)
    assert forward_flops(model, Shape(2, 3, 4), 2) == counted(model, 2, 3, 4)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_compressed_experts_are_composed_once_in_a_pass(share):
    model = build({"expert_rank": 2, "sparse_share": share})
    assert forward_flops(model, Shape(2, 9, 3), 2) == counted(model, 2, 9, 3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sparse", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("k", [1, 3, 4, None])
def test_active_parameters_by_hand(k, sparse, tied):
    model = build(sparse, tie_weight=tied)
    total = ffn = 0
    for name, parameter in model.named_parameters():
        share = (k or 2) / E if ".experts." in name else 1  # None: the model's own k
        used = int(parameter.numel() * share)
        total += used
        ffn += used if ".feed_forward.core." in name else 0
    assert active_parameters(model, k) == (total, ffn)
    if sparse == {}:
        assert ffn == 3 * (E * D + E + (k or 2) * (2 * H * D + H + D))


@pytest.mark.parametrize("router", ["random", "learned"])
@pytest.mark.parametrize("sparse", SPARSE.values(), ids=SPARSE)
def test_parameter_counts(sparse, router):
    model = build(None if sparse is None else {**sparse, "router": router})
    layers = 0 if sparse is None else len(sparse.get("layers", (0, 1, 2)))
    counts = parameter_counts(model)
    assert counts["router"] == layers * (E * D + E)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["total"] - counts["trainable"] == (counts["router"] if router == "random" else 0)
