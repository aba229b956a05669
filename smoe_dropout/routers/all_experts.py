"""All experts for every token, weighed by a softmax: CustomDenseGate of arXiv 2303.01610's code."""

from torch import Tensor

from smoe_dropout.routers import LinearRouter, Routing
from smoe_dropout.selection import Selection


class AllExpertsRouter(LinearRouter):
    """Learned router with all experts active in training, whatever k is; the official gate also has them in evaluation, here k = E."""

    uses = ("gate_weight",)

    @property
    def ragged(self) -> bool:
        """Return whether it takes a k for each token: in evaluation."""
        return not self.training

    def choose(self, logits_NE: Tensor, k: Selection) -> Routing:
        """Routing to all experts in training mode, else to the k largest logits."""
        return super().choose(logits_NE, self.num_experts if self.training else k)

    def learns_from_task(self, k: int) -> bool:
        """Return whether the gate weights depend on the router's parameters: in training all experts are active."""
        return super().learns_from_task(self.num_experts)

    def computed(self, k: int) -> int:
        """Experts computed per token."""
        return self.num_experts if self.training else k
