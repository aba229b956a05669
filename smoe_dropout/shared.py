"""State that the MoE layers of one model share during a forward pass."""

from torch import Tensor, nn


class Shared:
    """One instance per model, given by `moefy` to every MoE layer and router.

    tokens: ids of the current batch, set only where a layer or router needs them. carried: passed on from one MoE layer to the next.
    """

    def __init__(self):
        self.tokens: Tensor | None = None
        self.carried: Tensor | None = None

    def see_tokens(self, _embedding: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        """Store the token ids; a forward pre-hook of the model's token embedding."""
        self.tokens = inputs[0] if inputs else named["input"]

    def __getstate__(self) -> dict:  # state of a pass can be neither copied nor pickled
        return {"tokens": None, "carried": None}
