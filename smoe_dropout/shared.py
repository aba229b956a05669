"""State that the MoE layers of one model share during a forward pass."""

from torch import Tensor, nn


class Shared:
    """One instance per conversion, given by `moefy` to every MoE layer and router.

    tokens: ids of the current batch, set only where a layer or router needs them. carried: passed on from one MoE layer to the next.
    masks: for each running module that tells padding, the innermost last, which of its tokens are real, bool [B, T], or None if all are.
    given: such a mask set by `token_mask`, which takes precedence.
    """

    def __init__(self):
        self.tokens: Tensor | None = None
        self.carried: Tensor | None = None
        self.masks: list[Tensor | None] = []
        self.given: Tensor | None = None

    def see_tokens(self, _embedding: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        """Store the token ids; a forward pre-hook of the model's token embedding."""
        self.tokens = inputs[0] if inputs else named["input"]

    def real_tokens(self, x: Tensor) -> Tensor | None:
        """Which tokens of a layer's input [..., D] are real, bool [N]; None if all are, or if the mask has another shape."""
        mask = self.given if self.given is not None else self.masks[-1] if self.masks else None
        if mask is None or not (mask.shape == x.shape[:-1] or (x.dim() == 2 and len(x) == mask.numel())):
            return None
        return mask.reshape(-1).to(x.device)

    def __getstate__(self) -> dict:  # state of a pass can be neither copied nor pickled
        return vars(Shared())
