"""Weight decay acts on matrices only: not on biases of experts, norms and routers."""

import pytest
import torch
from torch import nn

import smoe_dropout as sd


def model(**settings) -> nn.Module:
    ffn = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    return sd.moefy(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), ffn), sd.SMoEConfig(4, 2, **settings))


@pytest.mark.parametrize("settings", [{"router": "learned"}, {"router": "noisy_top_k"}, {}, {"router": "learned", "expert_rank": 2}])
def test_groups(settings):
    made = model(**settings)
    names = {id(parameter): name for name, parameter in made.named_parameters()}
    groups = sd.parameter_groups(made, 0.1)
    decayed, spared = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert decayed[0] == "0.weight" and all(name.startswith(("2.experts.up", "2.experts.down")) for name in decayed[1:])
    assert sorted(decayed + spared) == sorted(name for name, parameter in made.named_parameters() if parameter.requires_grad)
    assert {"0.bias", "1.weight", "1.bias", "2.experts.bias_up", "2.experts.bias_down"} <= set(spared)
    torch.optim.AdamW(groups, lr=0.1)


def test_parameters_of_a_method_that_route_have_no_decay():
    transformers = pytest.importorskip("transformers")
    host = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    made = sd.moefy(host, sd.SMoEConfig(4, 2, router="learned", method="similarity"))
    [(_, layer)] = sd.moe_layers(made)
    assert any(parameter is layer.similarity for parameter in sd.parameter_groups(made, 0.1)[1]["params"])


def test_trainers_own_rule_spares_the_experts_biases():
    """It goes by names; a learned router it decays."""
    transformers = pytest.importorskip("transformers")
    names = transformers.Trainer.get_decay_parameter_names(None, model(router="learned"))
    assert names == ["0.weight", "2.router.weight", "2.experts.up", "2.experts.down"]
