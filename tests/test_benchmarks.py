"""Benchmarks: peers compute what we compute, and the command writes its record. Nothing here asserts a time."""

import json

import pytest
import torch

from benchmarks import data, layer, step
from benchmarks.__main__ import main
from benchmarks.measure import interleave, kept_mib, summarise
from benchmarks.peers import EXPERT_PEERS, dense_ffn, official_style, rel_shift, with_peer
from benchmarks.tables import markdown
from mem_transformer import MemTransformerLM, TransformerXLConfig, by_key
from smoe_dropout import MoELayer, SMoEConfig, moefy
from smoe_dropout.experts import Experts

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LAYER = ["layer", "--tokens", "24", "--num_experts", "4", "--d_model", "16", "--d_expert", "8", "--k", "1", "4"]
STEP = ["step", "--threads", "1", "--num_experts", "4", "--d_model", "16", "--d_expert", "8", "--k", "2"]
STEP += ["--n_layer", "2", "--n_head", "2", "--d_head", "8", "--batch_size", "2", "--tgt_len", "6"]


def moe_layer(k: int, d_model: int = 16, num_experts: int = 4) -> MoELayer:
    torch.manual_seed(3)
    experts = Experts(num_experts, d_model, 8, "relu", 0.0, "reference", 0.5)
    for bias in (experts.bias_up, experts.bias_down):
        torch.nn.init.normal_(bias)
    return MoELayer(d_model, experts, SMoEConfig(num_experts=num_experts, top_k=k, init_std=0.5, router="learned", balance_loss=0.0))


def assert_all_close(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("name", EXPERT_PEERS)
@pytest.mark.parametrize("k", [1, 3, 4])
@pytest.mark.parametrize("tokens", [2, 40])  # with 2, some experts have no token
def test_expert_peers_equal_ours(name, k, tokens):
    ours = moe_layer(k)
    x, grad = torch.randn(tokens, 16, requires_grad=True), torch.randn(tokens, 16)
    found = layer.forward_backward(with_peer(ours, name), x, grad, "fp32")
    assert_all_close(found, layer.forward_backward(ours, x, grad, "fp32"))


def test_dense_network_is_the_sum_of_all_experts():
    experts = moe_layer(4).experts
    x = torch.randn(10, 16)
    everywhere = torch.arange(4).expand(10, 4)
    torch.testing.assert_close(dense_ffn(experts)(x), experts(x, everywhere, torch.ones(10, 4)), **CLOSE)


@pytest.mark.parametrize("T, K", [(1, 1), (1, 4), (3, 3), (3, 8)])
def test_rel_shift_is_our_shift_where_nothing_is_masked(T, K):
    term = torch.randn(2, T, K)
    mask = torch.zeros(T, K).masked_fill(torch.ones(T, K, dtype=torch.bool).triu(1 + K - T), float("-inf"))
    theirs = rel_shift(term.permute(1, 2, 0)[..., None])[..., 0].permute(2, 0, 1)
    ours = by_key(torch.nn.functional.pad(term, (0, 1)), 1)[:, 0]
    torch.testing.assert_close(theirs + mask, ours + mask, rtol=0, atol=0)


def language_models(**settings) -> list[MemTransformerLM]:
    """Ours, and the same model computed the official way; weights large enough that every term of the attention counts."""
    torch.manual_seed(5)
    config = TransformerXLConfig(31, 2, 2, 16, 8, 32, dropout=0.0, mem_len=7, init_std=0.3, **settings)
    ours = moefy(MemTransformerLM(config), SMoEConfig(num_experts=4, top_k=2, init_std=0.3))
    return [ours, official_style(ours)]


def losses_and_gradients(model: MemTransformerLM) -> dict[str, torch.Tensor]:
    """Of two segments, the second with the memory of the first; gradients by the names of our parameters."""
    tokens = torch.randint(31, (3, 11), generator=torch.Generator().manual_seed(6))
    first, memory, _ = model(tokens[:, :5], tokens[:, 1:6])
    second, memory, _ = model(tokens[:, 5:10], tokens[:, 6:11], memory)
    (first.mean() + second.mean()).backward()
    gradients = {name.replace("experts.experts.", "experts."): parameter.grad for name, parameter in model.named_parameters()}
    return {"first": first, "second": second, "memory": torch.stack(memory), **gradients}


@pytest.mark.parametrize("settings", [{}, {"same_length": True}, {"pre_lnorm": True}], ids=str)
def test_official_style_model_equals_ours(settings):
    expected, found = map(losses_and_gradients, language_models(**settings))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:  # a frozen router
            assert "router" in name and found[name] is None
        else:
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def test_official_style_shares_no_parameter_with_ours():
    ours, theirs = language_models()
    assert not {id(parameter) for parameter in ours.parameters()} & {id(parameter) for parameter in theirs.parameters()}


def test_training_steps_of_both_models_agree():
    flags = step.StepFlags(num_experts=4, d_model=16, d_expert=8, k=2, n_layer=1, n_head=2, d_head=8, batch_size=2, tgt_len=6)
    models = step.contestants(flags)
    steps = [step.training_step(models[name], flags, "fp32") for name in (step.OURS, step.OFFICIAL)]
    losses = [[take() for _ in range(5)] for take in steps]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_contestants_take_turns_and_the_warm_up_round_is_dropped():
    order: list[str] = []
    seconds = interleave({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert [sorted(order[i : i + 2]) for i in (0, 2, 4)] == [["a", "b"]] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_within_rounds():
    found = summarise({"base": [1.0, 10.0, 2.0], "other": [2.0, 10.0, 1.0]}, "base")
    assert found["other"] == {"seconds": 2.0, "ratio": 1.0, "ratio_min": 0.5, "ratio_max": 2.0}
    assert found["base"]["ratio"] == found["base"]["ratio_min"] == found["base"]["ratio_max"] == 1.0


def test_kept_memory_counts_each_buffer_once_and_no_parameter():
    weight = torch.ones(2**9, 2**9, requires_grad=True)  # 1 MiB
    assert kept_mib(lambda: (weight * 2.0).exp().square(), [weight]) == 1.0  # exp keeps its result, which square keeps too


@pytest.mark.parametrize("argv, rows", [(LAYER, 4), (STEP, 1)], ids=["layer", "step"])
def test_command_writes_a_record_and_prints_its_table(argv, rows, tmp_path, capsys):
    main([*argv, "--rounds", "2", "--out", str(tmp_path)])
    record = json.loads((tmp_path / f"{argv[0]}.json").read_text())
    assert record["benchmark"] == argv[0] and record["schema"] == 1
    assert {"commit", "torch", "device_name", "threads", "cores"} <= record["environment"].keys()
    assert len(record["rows"]) == rows
    for row in record["rows"]:
        assert row["precision"] in ("fp32", "bf16") and row["k"] in (1, 2, 4)
        assert row["results"][record["baseline"]]["ratio"] == 1
        for result in row["results"].values():
            assert result.keys() == {"seconds", "ratio", "ratio_min", "ratio_max", "kept_mib"}
    printed = capsys.readouterr().out
    assert printed == markdown(record) + "\n"
    assert all(f"| {name} |" in printed for name in record["rows"][0]["results"])


def test_data_contestants_are_fresh_processes_that_do_their_work(tmp_path):
    source, out = tmp_path / "text", tmp_path / "prepared"
    data.write_text(source, 12_345)
    assert source.stat().st_size == 12_345
    found = data.contestants(source, out, 0.012345)
    for name in (data.BARE, "train.py refuses a wrong flag", "data/prepare.py, 0.012345 MB"):
        found[name]()
    assert json.loads((out / "meta.json").read_text())["text"]["bytes"] == 12_345
    with pytest.raises(RuntimeError, match="exited with 3, not 0"):
        data.process("-c", "raise SystemExit(3)")()


def test_data_command_writes_a_record_and_prints_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(data, "interleave", lambda calls, rounds: {name: [2.0] * rounds for name in calls})
    main(["data", "--megabytes", "0.01", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "data.json").read_text())
    assert record["rows"][0]["results"]["data/prepare.py, 0.01 MB"]["seconds"] == 2
    assert capsys.readouterr().out == markdown(record) + "\n"
