"""State that the MoE layers of one model share during a forward pass."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor, nn


class Shared(threading.local):
    """One instance per conversion, given by `moefy` to every MoE layer and router; its values are those of the calling thread's pass.

    batch: the running model's input. tokens: ids of the current batch, set only where a layer or router needs them. carried: passed on from
    one MoE layer to the next. uses: those of every layer so far; None if the model is not running. real_N: which tokens of the running
    layer are real; None: all. masks: for each running module that tells padding, the innermost last, which of its tokens are real, bool
    [B, T], or None if all are. shown: logits of routers that were asked to return them. repeated: record of the pass that activation
    checkpointing repeats. alone: layers that have run on these tokens while the model was not running. By index of the layer after an
    attention module, probabilities: those that the module returned, and pasts: earlier positions in the cache it was given, or None
    without a cache.
    """

    def __init__(self):
        self.batch: Tensor | None = None
        self.tokens: Tensor | None = None
        self.carried: Tensor | None = None
        self.uses: dict[nn.Module, list[Any]] | None = None
        self.real_N: Tensor | None = None
        self.masks: list[Tensor | None] = []
        self.shown: dict[nn.Module, list[Tensor]] = {}
        self.repeated: Any = None
        self.alone: set[nn.Module] = set()
        self.probabilities: dict[int, Tensor] = {}
        self.pasts: dict[int, Any] = {}

    def begin(self, batch: Tensor | None) -> None:
        """Prepare for a pass of the model."""
        self.batch, self.tokens, self.carried, self.uses = batch, None, None, {}
        self.probabilities, self.pasts = {}, {}

    def end(self) -> None:
        """Forget what is of no meaning after a pass, such as its token ids."""
        self.batch, self.tokens, self.carried, self.uses = None, None, None, None

    def see_tokens(self, _embedding: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        """Store the token ids; a forward pre-hook of the model's token embedding."""
        self.tokens = inputs[0] if inputs else named["input"]
        self.alone = set()

    def see_use(self, layer: nn.Module) -> None:
        """Forget the token ids if a layer runs again, the embedding has not, and the model is not running: they are of another batch."""
        if self.uses is None and self.repeated is None and self.tokens is not None:
            if layer in self.alone:
                self.tokens = None
            self.alone.add(layer)

    def real_tokens(self, x: Tensor, given: Tensor | None) -> Tensor | None:
        """Which tokens of a layer's input [..., D] are real, bool [N]; None if all are, or if the mask has another shape.

        given: by `token_mask`, which takes precedence.
        """
        mask = given if given is not None else self.masks[-1] if self.masks else None
        if mask is None or not (mask.shape == x.shape[:-1] or (x.dim() == 2 and len(x) == mask.numel())):
            return None
        return mask.reshape(-1).to(x.device)

    def __reduce__(self):  # state of a pass can be neither copied nor pickled
        return Shared, ()
