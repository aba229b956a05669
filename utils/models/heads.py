"""What is put on a pre-trained model to fine-tune it. All keep it as `backbone`, and are called as model(*inputs, state) -> (losses [B, 1]
in nats, None, logits [..., C]).

Shape suffixes: B rows, S sequences of a row, T positions, L places of an equation, D model width, C classes, V symbols.
"""

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout import moe_layers

IGNORED = -1  # a place without a target


class Scorer(nn.Module):
    """Chooses one of several answers. A row is one sequence, with `outputs` classes, or a sequence for every choice, with one output."""

    def __init__(self, backbone: nn.Module, architecture: ModuleType, width: int, outputs: int, dropout: float, init_std: float):
        super().__init__()
        self.backbone = architecture.without_head(backbone)
        self._hidden_states, self._summary = architecture.hidden_states, architecture.summary
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, outputs))
        initialise(self.head, init_std)

    def forward(self, tokens_BST: Tensor, lengths_BS: Tensor, answers_B: Tensor, state: None = None) -> tuple[Tensor, None, Tensor]:
        lengths = lengths_BS.flatten()
        hidden = self._hidden_states(self.backbone, tokens_BST.flatten(0, 1), lengths)
        logits_B1C = self.head(self._summary(hidden, lengths)).float().view(len(tokens_BST), 1, -1)
        return F.cross_entropy(logits_B1C[:, 0], answers_B, reduction="none")[:, None], None, logits_B1C


class Continuation(nn.Module):
    """A causal model that writes the equation behind the question; nothing is put on it."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, state: None = None) -> tuple[Tensor, None, Tensor]:
        """Losses are means over each row's targets; logits [targets, V]."""
        logits_BTV, _ = self.backbone.logits(tokens_BT)
        return row_losses(logits_BTV, targets_BT)

    @torch.no_grad()
    def write(self, questions: list[Tensor], end: int, limit: int) -> list[list[int]]:
        """The likeliest next token again and again until `end`, which is left out, or `limit` tokens. Rows of one length go together, so
        that there is no padding. What was read is kept as memory, unless a token alone would be routed, or see, otherwise than in its text.
        """
        written: list[list[int]] = [[] for _ in questions]
        by_length: dict[int, list[int]] = {}
        for index, question in enumerate(questions):
            by_length.setdefault(len(question), []).append(index)
        mem_len = self.backbone.mem_len
        try:
            for length, rows in by_length.items():
                self.backbone.mem_len = length + limit
                self._continue(torch.stack([questions[row] for row in rows]), [written[row] for row in rows], end, limit)
        finally:
            self.backbone.mem_len = mem_len
        return written

    def _continue(self, tokens_BT: Tensor, written: list[list[int]], end: int, limit: int) -> None:
        again = self.backbone.config.same_length or any(layer.needs for _, layer in moe_layers(self.backbone))
        cache, ended = None, torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
        for _ in range(limit):
            logits, cache = self.backbone.read(tokens_BT, None if again else cache)
            next_B1 = logits[:, -1:].argmax(-1)
            tokens_BT = torch.cat([tokens_BT, next_B1], 1) if again else next_B1
            ended |= next_B1[:, 0] == end
            if ended.all():
                return
            for row, token, over in zip(written, next_B1[:, 0].tolist(), ended.tolist(), strict=True):
                if not over:
                    row.append(token)


class Decoder(nn.Module):
    """A small Transformer decoder that writes the equation, looking at what an encoder made of the question. END begins and ends it."""

    END = 0

    def __init__(self, backbone: nn.Module, architecture: ModuleType, sizes: "DecoderSizes", init_std: float):
        super().__init__()
        self.backbone, self._hidden_states = architecture.without_head(backbone), architecture.hidden_states
        width = sizes.width
        self.symbols, self.places = nn.Embedding(sizes.symbols, width), nn.Embedding(sizes.longest, width)
        layer = nn.TransformerDecoderLayer(width, sizes.heads, 4 * width, sizes.dropout, batch_first=True)
        self.layers, self.out = nn.TransformerDecoder(layer, sizes.layers), nn.Linear(width, sizes.symbols)
        for module in (self.symbols, self.places, self.out):
            initialise(module, init_std)

    def _logits(self, read: tuple[Tensor, Tensor], before_BL: Tensor) -> Tensor:
        """Of the symbol behind each of those `before` [B, L, V]; read: the question's states [B, T, D], and which are padding [B, T]."""
        L = before_BL.shape[1]
        x_BLD = self.symbols(before_BL) + self.places.weight[:L]
        future_LL = torch.ones(L, L, dtype=torch.bool, device=before_BL.device).triu(1)
        return self.out(self.layers(x_BLD, read[0], tgt_mask=future_LL, memory_key_padding_mask=read[1]))

    def _read(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        padding_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) >= lengths_B[:, None]
        return self._hidden_states(self.backbone, tokens_BT, lengths_B), padding_BT

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor, targets_BL: Tensor, state: None = None) -> tuple[Tensor, None, Tensor]:
        """Losses are means over each row's targets; logits [targets, V]."""
        before_BL = F.pad(targets_BL.clamp(min=0), (1, 0), value=self.END)[:, :-1]
        return row_losses(self._logits(self._read(tokens_BT, lengths_B), before_BL), targets_BL)

    @torch.no_grad()
    def write(self, tokens_BT: Tensor, lengths_B: Tensor) -> list[list[int]]:
        """The likeliest next symbol again and again until END, which is left out, or as many as there are places for."""
        read, written_BL = self._read(tokens_BT, lengths_B), torch.full((len(tokens_BT), 1), self.END, device=tokens_BT.device)
        for _ in range(self.places.num_embeddings):
            written_BL = torch.cat([written_BL, self._logits(read, written_BL)[:, -1:].argmax(-1)], 1)
            if (written_BL[:, 1:] == self.END).any(1).all():
                break
        rows = written_BL[:, 1:].tolist()
        return [row[: row.index(self.END)] if self.END in row else row for row in rows]


class DecoderSizes(NamedTuple):
    """symbols: that equations are made of, with END. longest: places of an equation."""

    symbols: int
    longest: int
    width: int
    heads: int
    dropout: float
    layers: int = 2


def row_losses(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, None, Tensor]:
    """The mean loss of each row's targets [B, 1], and the logits at them [targets, V]."""
    asked_BL = targets_BL != IGNORED
    logits = logits_BLV.float()
    losses_BL = F.cross_entropy(logits.flatten(0, 1), targets_BL.flatten(), ignore_index=IGNORED, reduction="none").view_as(targets_BL)
    return losses_BL.sum(1, keepdim=True) / asked_BL.sum(1, keepdim=True), None, logits[asked_BL]


def initialise(module: nn.Module, std: float) -> None:
    """Weights from N(0, std), biases 0, as in pre-training."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, 0.0, std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
