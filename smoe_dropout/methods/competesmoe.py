"""CompeteSMoE: in competition steps runs all experts, uses those with the strongest responses, and distils them into the router.

Pham et al. 2024 (arXiv 2402.02526): s_i = ||E_i(x)||_2, S = the k largest of s, y = sum over S with weights softmax(s_S), and the router's
loss is MSE(softmax(router logits), t). Each layer draws at random whether to compete in a step. All other steps, and inference, use an
ordinary learned top-k router with its balance loss, which a competition step does not have.

Defaults are those of the authors' code (giangdip2410/CompeteSMoE, cacb77e): t is softmax(s_S) on S and 0 elsewhere, and is not detached, so
that it also trains the experts; 14 of 16 scripts of pre-training have --freq 1.0, all have --alpha 5.0, and their trainer multiplies that
loss by --load_balance, which is 0.01 in 15. Not here: six scripts average responses and router logits (--combine_gate), four add a balance
loss of the responses (--opt_blance), and none gives the steps without competition a balance loss (--g_blance). Our reading of the paper is
target=all, detach=true, times_balance=false, flip_rate=0.03, router_loss=1. The falling flip rate, 2 / (2 + sqrt(e + 1)) in epoch e (their
--freq_type function, in none of their scripts), is decreasing=true: each step draws at that rate, where their code draws once for all steps
of an epoch. The authors have withdrawn this code in favour of that of the successor, `competesmoe2`.
"""

from smoe_dropout.competition import CompeteLayer, Options
from smoe_dropout.config import SMoEConfig
from smoe_dropout.methods.base import LEARNED_ROUTER, Method
from smoe_dropout.options import build_options


def refusal(config: SMoEConfig) -> str | None:
    """Error sentence for a trained router whose loss is multiplied by a balance coefficient of 0, else None."""
    options = build_options(Options, config.options, known=dict.fromkeys(config.options))
    if (
        options.times_balance
        and options.router_loss
        and config.balance_loss == 0
        and config.router == "learned"
        and not config.freeze_router
    ):
        return "balance_loss = 0 multiplies the router's loss as well: give option times_balance = False, or leave balance_loss out"
    return None


METHOD = Method(
    name="competesmoe",
    title="CompeteSMoE",
    source="arXiv 2402.02526",
    sparse=True,
    flags=LEARNED_ROUTER,
    options=Options,
    layer=CompeteLayer,
    routers=("learned", "random"),
    refusal=refusal,
)
