"""Feed-forward networks that lie in a block: converted exactly, dropout of hidden units included, or refused with the reason."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import smoe_dropout as sd
from smoe_dropout.hosts import find_sites

D, WIDE = 8, 16
EXACT = {"num_experts": 4, "top_k": 4, "expert_init": "split", "gate_weight": "uniform", "output_scale": "dense"}


class Block(nn.Module):
    """Norm, up, down, and a residual; subclasses say what lies between."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, WIDE), nn.Linear(WIDE, D)
        self.act, self.drop, self.act_dropout, self.out_dropout = nn.GELU(), nn.Dropout(0.4), 0.5, 0.25


class Method(Block):
    """A method lies between, which cannot be switched off without its other uses."""

    def forward(self, x):
        h = self.between(self.up(self.norm(x)))
        return x + self.down(h)

    def between(self, h):
        return self.act(h)


class Module(Block):
    def forward(self, x):
        h = self.act(self.up(self.norm(x)))
        h = self.drop(h)
        h = self.down(h)
        return x + F.dropout(h, p=self.out_dropout, training=self.training)


class Functional(Block):
    """Activation and dropout as attributes that are no modules."""

    def __init__(self):
        super().__init__()
        del self.act
        self.act = F.silu

    def forward(self, x):
        h = self.act(self.up(x))
        h = F.dropout(h, p=self.act_dropout, training=self.training)
        h = self.down(h)
        h = F.dropout(h, p=self.out_dropout, training=self.training)
        return self.norm(h + x)


class SharedDropout(Block):
    """One module is the dropout of hidden units and of the output."""

    def forward(self, x):
        h = self.drop(self.act(self.up(x)))
        h = self.down(h)
        h = self.drop(h)
        return h + x


class Branches(Block):
    def forward(this, x, fast=False):
        y = this.norm(x)
        if fast:
            y = this.down(this.act(this.up(y)))
        else:
            y = this.up(y)
            y = this.act(y)
            y = this.down(y)
        return x + y


class Split(nn.Module):
    """The two maps in two modules, in a method of the block."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(nn.Linear(D, WIDE), nn.ReLU(), nn.Dropout(0.3))
        self.narrow = Narrow()

    def forward(self, x):
        return self.chunk(x)

    def chunk(self, x):
        hidden = self.wide(x)
        return self.narrow(hidden, x)


class Narrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.map, self.norm = nn.Linear(WIDE, D), nn.LayerNorm(D)

    def forward(self, hidden, x):
        return self.norm(self.map(hidden) + x)


def normed():
    return nn.Sequential(nn.LayerNorm(D), nn.Linear(D, WIDE), nn.SiLU(), nn.Dropout(0.2), nn.Linear(WIDE, D), nn.Dropout(0.1))


class Fused(Block):
    def __init__(self):
        super().__init__()
        self.up, self.act = nn.Linear(D, 2 * WIDE), nn.GLU(-1)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


def stacked(make):
    torch.manual_seed(0)
    model = nn.Sequential(*(make() for _ in range(2)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("make", "activation", "dropout", "left"),
    [
        (Module, "gelu", 0.4, {0.0, 0.25}),
        (Functional, "silu", 0.5, {0.25}),
        (SharedDropout, "gelu", 0.4, {0.4}),
        (Branches, "gelu", 0.0, set()),
        (Split, "relu", 0.3, set()),
        (normed, "silu", 0.2, {0.1}),
        (Fused, "sigmoid_gated", 0.0, set()),
    ],
)
def test_network_in_a_block_is_replaced_exactly(make, activation, dropout, left, monkeypatch):
    """Dropout of hidden units becomes the experts' own and happens nowhere else; that of the output stays."""
    model, x = stacked(make), torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dense = model(x)
        assert [(site.activation, site.dropout) for site in find_sites(model)] == [(activation, dropout)] * 2
        torch.testing.assert_close(sd.moefy(model, sd.SMoEConfig(**EXACT))(x), dense, rtol=1e-5, atol=1e-5)
        if make is Branches:
            torch.testing.assert_close(model[0](x, fast=True), model[0](x), rtol=1e-5, atol=1e-5)
    seen, plain = set(), F.dropout
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: (seen.add(p * training), plain(x, 0.0))[1])
    for layer in (layer for _, layer in sd.moe_layers(model.train())):
        assert layer.experts.dropout == dropout
        layer.experts.dropout = 0.0
    model(x)
    assert seen - {0.0} == left - {0.0}


class Inline(Block):
    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class InOneStatement(Block):
    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Leaks(Block):
    def forward(self, x):
        h = self.act(self.up(x))
        return self.down(h) + h.mean()


class LeaksLater(Block):
    def forward(self, x):
        h = self.act(self.up(x))
        y = self.down(h)
        return x + y * h.std()


class Scales(Block):
    def forward(self, x):
        h = self.act(self.up(x)) / math.sqrt(2)
        return x + self.down(h)


class Clips(Block):
    def forward(self, x):
        return x + self.down(self.act(self.up(x)).clamp(max=50))


class LongOnly(Block):
    def forward(self, x):
        h = self.act(self.up(x))
        if x.shape[1] > 8:
            h = h * 2
        return x + self.down(h)


class Norms(Block):
    def __init__(self):
        super().__init__()
        self.inner = nn.LayerNorm(WIDE)

    def forward(self, x):
        return x + self.down(self.inner(self.act(self.up(x))))


class PlainNorm(Block):
    def forward(self, x):
        return x + self.down(F.layer_norm(self.act(self.up(x)), (WIDE,)))


class Twice(Block):
    """The activation also serves something else."""

    def forward(self, x):
        x = self.act(x)
        return x + self.down(self.act(self.up(x)))

    def other(self, x):
        return self.act(x)


class Reads(Block):
    def forward(self, x):
        y = self.down(self.act(self.up(x)))
        return y + self.up.weight.mean()


class FixedDropout(Block):
    def forward(self, x):
        return x + self.down(F.dropout(self.act(self.up(x)), 0.3, self.training))


class AnotherDropout(Block):
    """One rate for hidden units and the output."""

    def forward(self, x):
        h = F.dropout(self.act(self.up(x)), p=self.act_dropout, training=self.training)
        h = self.down(h)
        return x + F.dropout(h, p=self.act_dropout, training=self.training)


class TrainsDifferently(Block):
    def forward(self, x):
        h = self.up(x)
        h = self.act(h) if not self.training else torch.tanh(h)
        return x + self.down(h)


class Linear(Block):
    def forward(self, x):
        return x + self.down(self.up(x))


class Times(Block):
    """Gated by something that is not a map of the same input."""

    def forward(self, x, other=None):
        other = x.roll(1)
        h = self.act(self.up(x)) * other.repeat(1, 1, 2)
        return x + self.down(h)


class Detaches(Block):
    def forward(self, x):
        return x + self.down(self.act(self.up(x)).detach())


class Straight(Block):
    """Straight-through estimate: the value of one function with the gradient of another."""

    def forward(self, x):
        h = self.up(x)
        h = h + (self.act(h) - h).detach()
        return x + self.down(h)


class Stores(Block):
    def forward(self, x):
        self.last = self.act(self.up(x))
        return x + self.down(self.last)


class Counts(Block):
    """Changes a buffer in place, which trying must not do to the model."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDE))

    def forward(self, x):
        h = self.act(self.up(x))
        self.mean.lerp_(h.detach().mean((0, 1)), 0.5)
        return x + self.down(h)


class Hooked(Block):
    def __init__(self):
        super().__init__()
        self.up.register_forward_hook(lambda _, __, y: 2 * y)

    def forward(self, x):
        return x + self.down(self.act(self.up(x)))


class Dynamic(Block):
    def forward(self, x):
        h = self.act(self.up(x))
        y = self.down(h)
        return x + y + getattr(self, "up")(x).mean()  # noqa: B009


class Flag(Block):
    def forward(self, x, output_hidden=False):
        h = self.act(self.up(x))
        y = x + self.down(h)
        return (y, h) if output_hidden else y


class SharedActivation(Block):
    """Two networks with one activation, whose statements follow each other."""

    def __init__(self):
        super().__init__()
        self.other, self.back = nn.Linear(D, WIDE), nn.Linear(WIDE, D)

    def forward(self, x):
        h = self.act(self.up(x))
        h = self.down(h)
        g = self.act(self.other(x))
        g = self.back(g)
        return x + h + g


class NormInside(Block):
    """The first map's child normalises its input, as in RoBERTa with norms before."""

    def __init__(self):
        super().__init__()
        del self.up, self.act
        self.wide = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, WIDE), nn.GELU())

    def forward(self, x):
        h = self.wide(x)
        return x + self.down(h)


class Plain(Block):
    def __init__(self):
        super().__init__()
        del self.norm

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Plain()

    def forward(self, x):
        return x + self.mlp(hidden=x)


class ReadFromOutside(Named):
    def forward(self, x):
        return x + self.mlp(x) + self.mlp.up(x).mean()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Detaches, "gradients are not those"),
        (Straight, "gradients are not those"),
        (Stores, "changes its attribute 'last'"),
        (Counts, "changes its attribute 'mean'"),
        (Hooked, "'up' has hooks"),
        (Dynamic, "uses 'up' elsewhere|fails on an input"),
        (Flag, "uses hidden values elsewhere"),
        (SharedActivation, "uses 'act' elsewhere"),
        (NormInside, r"the norm '0' \(LayerNorm\) lies in 'wide'"),
        (Named, "Named calls it with hidden="),
        (ReadFromOutside, "ReadFromOutside reads its 'up'"),
        (Method, "uses 'act' elsewhere"),
        (Inline, "cannot be switched off"),
        (InOneStatement, "cannot be switched off"),
        (Leaks, "uses hidden values elsewhere"),
        (LeaksLater, "uses hidden values elsewhere"),
        (Scales, "next to it, is none that experts support"),
        (Clips, "next to it, is none that experts support"),
        (LongOnly, "next to it, is none that experts support"),
        (Norms, r"the norm 'inner' \(LayerNorm\) lies between"),
        (PlainNorm, "hidden units are mixed"),
        (Twice, "uses 'act' elsewhere"),
        (Reads, "fails on an input.*has no attribute 'weight'"),
        (FixedDropout, "functional dropout of 0.3 between the maps has no attribute"),
        (AnotherDropout, "serves something else|uses 'act_dropout' elsewhere"),
        (TrainsDifferently, "in training and in evaluation|different things"),
        (Linear, "no activation between"),
        (Times, "not all treated alike|is none that experts support|it fails"),
    ],
)
def test_what_is_not_exact_is_refused(make, words):
    model = stacked(make)
    before = {name: module for name, module in model.named_modules()}
    with pytest.raises(sd.ConfigError, match=words):
        sd.moefy(model, sd.SMoEConfig(**EXACT))
    assert dict(model.named_modules()) == before
    assert all(not buffer.any() for buffer in model.buffers())
