"""CompeteSMoE's successor (Nguyen et al. 2025, arXiv 2505.13380): the layer of `competesmoe` with other responses, losses and steps.

s_i = mean softplus(E_i(x)), y = sum over the k largest with weights s_S / sum(s_S). At a competition step the router's loss is 0.01 times
MSE(softmax(router logits), softmax(s)) + theta MSE of the same over the k winners, with a detached target, plus the diversity loss, the
mean cosine similarity of the winners' outputs; there is no balance loss. Competition is planned before training: rate 0.07, at most two
layers a step, none in the first 5 %. Values are the defaults of Fsoft-AIC/CompeteSMoE (0be1cb7), pre-training, with its "hybrid" loss; its
sweep has theta 0.2, three layers, router loss 0.001, no warm-up and an entropy loss of the responses' balance in competition steps, which
is not here; its vision code has a weight for diversity of its own. Its balance loss of other steps is an entropy; here it is that of the
learned router (Switch).
"""

from dataclasses import dataclass
from typing import Literal

from smoe_dropout import competition
from smoe_dropout.methods.base import LEARNED_ROUTER, Method
from smoe_dropout.options import option


@dataclass(frozen=True)
class Options(competition.Options):
    """Options of `competesmoe` with the successor's defaults."""

    flip_rate: float = 0.07
    affinity: Literal["norm", "softplus"] = "softplus"
    predrawn: bool = True
    router_loss: float = 0.01
    target: Literal["winners", "all"] = "all"
    detach: bool = True
    times_balance: bool = False
    winners_loss: float = 0.1
    diversity_loss: float = 0.005
    moved: bool = option(True, needs="predrawn")


class Layer(competition.CompeteLayer):
    """Layer with competition steps of the successor."""

    Options = Options


METHOD = Method(
    name="competesmoe2",
    title="CompeteSMoE, 2025",
    source="arXiv 2505.13380",
    sparse=True,
    flags=LEARNED_ROUTER,
    options=Options,
    layer=Layer,
    routers=("learned", "random"),
)
