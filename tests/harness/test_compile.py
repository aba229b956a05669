"""--compile: full graphs, one for every k, and the same training."""

from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState

from smoe_dropout import set_top_k
from tests import tiny
from tests.tiny import parse
from utils.engine import Engine
from utils.errors import UserError
from utils.models.build import build_model


@pytest.fixture(autouse=True)
def without_generated_code(monkeypatch):
    """Graphs are traced, forward and backward, and run as they are: generating code takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    AcceleratorState._reset_state(reset_partial_state=True)  # else the precision is that of the first engine of this process
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(ks: list[int], **changes) -> tuple[list[float], torch.Tensor]:
    """Losses of some steps of plain descent, and the gradient of the last."""
    flags = parse(tiny.flags("data", "run", dropout=0.0, n_layer=1, **changes))
    torch.manual_seed(0)
    with Engine(flags) as engine:
        model, memory, losses = engine.prepare(build_model(flags)).train(), None, []
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for step, k in enumerate(ks):
            set_top_k(model, k)
            tokens = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(step))
            found, memory, _ = engine.forward(tokens[:, :-1], tokens[:, 1:], memory)
            loss = found.mean()
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.1 * gradient
            losses.append(loss.item())
    return losses, gradients[0]


@pytest.mark.parametrize(("precision", "tolerance", "ks"), [("fp32", 1e-5, [2, 2, 3, 4, 2]), ("bf16", 1e-2, [2, 2, 3])])
def test_there_is_one_graph_per_k_without_graph_breaks(precision, tolerance, ks):
    eager = trained(ks, method="smoe_dropout", precision=precision)
    compiled = trained(ks, method="smoe_dropout", precision=precision, compile=True)
    torch.testing.assert_close(torch.tensor(compiled[0]), torch.tensor(eager[0]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(compiled[1], eager[1], rtol=tolerance, atol=tolerance)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # besides one for every k: the first segment is without memory, and the memory's length becomes a variable
    assert len(set(ks)) <= counters["stats"]["unique_graphs"] <= len(set(ks)) + 2


def test_graph_breaks_are_refused():
    """Competition is drawn at random, so the computation depends on data."""
    with pytest.raises(UserError, match=r"--compile: this model cannot be compiled into one graph \(.*\): leave the flag out"):
        trained([2], method="competesmoe", compile=True)
