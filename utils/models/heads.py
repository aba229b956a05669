"""Heads that turn a pre-trained model into one for a fine-tuning task. Each keeps it as `backbone` and is called as
model(*inputs, state) -> (losses [B, 1] in nats, None, logits [..., C]).

Shape suffixes: B rows, S sequences of a row, T positions, L symbols of an equation, D model width, C classes, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout import moe_layers
from utils.flags.fields import Flags
from utils.models.registry import Architecture

IGNORED = -1  # target of a position without a loss


class Scorer(nn.Module):
    """Chooses an answer. A row is one sequence, scored for `outputs` classes, or one sequence for each choice, each with one score."""

    def __init__(self, backbone: nn.Module, architecture: Architecture, outputs: int, flags: Flags):
        super().__init__()
        self.backbone = architecture.without_head(backbone)
        self._hidden_states, self._summary = architecture.hidden_states, architecture.summary
        width, rate = flags.d_model, flags.dropout
        twice = flags.head_dropout == "twice" or not getattr(architecture, "DROPPED", False)
        self.head = nn.Sequential(
            nn.Dropout(rate if twice else 0.0), nn.Linear(width, width), nn.Tanh(), nn.Dropout(rate), nn.Linear(width, outputs)
        )
        initialise(self.head, flags.init_std)

    def forward(self, tokens_BST: Tensor, lengths_BS: Tensor, answers_B: Tensor, state: None = None) -> tuple[Tensor, None, Tensor]:
        lengths = lengths_BS.flatten()
        hidden = self._hidden_states(self.backbone, tokens_BST.flatten(0, 1), lengths)
        logits_B1C = self.head(self._summary(hidden, lengths)).float().view(len(tokens_BST), 1, -1)
        return F.cross_entropy(logits_B1C[:, 0], answers_B, reduction="none")[:, None], None, logits_B1C


class Continuation(nn.Module):
    """A causal model that writes the equation after the question, with the head it was pre-trained with."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, state: None = None) -> tuple[Tensor, None, Tensor]:
        """The mean loss over each row's targets, and the logits [targets, V]."""
        logits_BTV, _ = self.backbone.logits(tokens_BT)
        return row_losses(logits_BTV, targets_BT)

    @torch.no_grad()
    def write(self, questions: list[Tensor], end: int, limit: int) -> list[list[int]]:
        """Decodes greedily up to `end`, which is left out, or `limit` tokens. Rows of equal length are decoded together, without padding.
        Read tokens are kept as memory, unless the text has to be reread: see `_continue`.
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
        # read alone, a token would attend to less, or be routed differently, than within its text
        reread = self.backbone.config.same_length or any(layer.needs for _, layer in moe_layers(self.backbone))
        cache, ended = None, torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
        for _ in range(limit):
            logits, cache = self.backbone.read(tokens_BT, None if reread else cache)
            next_B1 = logits[:, -1:].argmax(-1)
            tokens_BT = torch.cat([tokens_BT, next_B1], 1) if reread else next_B1
            ended |= next_B1[:, 0] == end
            if ended.all():
                return
            for row, token, has_ended in zip(written, next_B1[:, 0].tolist(), ended.tolist(), strict=True):
                if not has_ended:
                    row.append(token)


class Decoder(nn.Module):
    """A small Transformer decoder that writes the equation from an encoder's states of the question. END starts and ends an equation.

    symbols: size of the vocabulary, including END. longest: most symbols of an equation.
    """

    END = 0

    def __init__(self, backbone: nn.Module, architecture: Architecture, symbols: int, longest: int, flags: Flags):
        super().__init__()
        self.backbone, self._hidden_states = architecture.without_head(backbone), architecture.hidden_states
        width = flags.d_model
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(longest, width)
        layer = nn.TransformerDecoderLayer(width, flags.n_head, 4 * width, flags.dropout, batch_first=True)
        self.layers, self.out = nn.TransformerDecoder(layer, 2), nn.Linear(width, symbols)
        for module in (self.symbols, self.places, self.out):
            initialise(module, flags.init_std)

    def _logits(self, read: tuple[Tensor, Tensor], before_BL: Tensor) -> Tensor:
        """Logits of the symbol after each of `before` [B, L, V]. read: states of the question [B, T, D], and its padding mask [B, T]."""
        L = before_BL.shape[1]
        x_BLD = self.symbols(before_BL) + self.places.weight[:L]
        future_LL = torch.ones(L, L, dtype=torch.bool, device=before_BL.device).triu(1)
        return self.out(self.layers(x_BLD, read[0], tgt_mask=future_LL, memory_key_padding_mask=read[1]))

    def _read(self, tokens_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        padding_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) >= lengths_B[:, None]
        return self._hidden_states(self.backbone, tokens_BT, lengths_B), padding_BT

    def forward(self, tokens_BT: Tensor, lengths_B: Tensor, targets_BL: Tensor, state: None = None) -> tuple[Tensor, None, Tensor]:
        """The mean loss over each row's targets, and the logits [targets, V]."""
        before_BL = F.pad(targets_BL.clamp(min=0), (1, 0), value=self.END)[:, :-1]
        return row_losses(self._logits(self._read(tokens_BT, lengths_B), before_BL), targets_BL)

    @torch.no_grad()
    def write(self, tokens_BT: Tensor, lengths_B: Tensor) -> list[list[int]]:
        """Decodes greedily up to END, which is left out, or the number of positions."""
        read, written_BL = self._read(tokens_BT, lengths_B), torch.full((len(tokens_BT), 1), self.END, device=tokens_BT.device)
        for _ in range(self.places.num_embeddings):
            written_BL = torch.cat([written_BL, self._logits(read, written_BL)[:, -1:].argmax(-1)], 1)
            if (written_BL[:, 1:] == self.END).any(1).all():
                break
        rows = written_BL[:, 1:].tolist()
        return [row[: row.index(self.END)] if self.END in row else row for row in rows]


def row_losses(logits_BLV: Tensor, targets_BL: Tensor) -> tuple[Tensor, None, Tensor]:
    """The mean loss over each row's targets [B, 1], and the logits at the targets [targets, V]."""
    scored_BL = targets_BL != IGNORED
    logits = logits_BLV.float()
    losses_BL = F.cross_entropy(logits.flatten(0, 1), targets_BL.flatten(), ignore_index=IGNORED, reduction="none").view_as(targets_BL)
    return losses_BL.sum(1, keepdim=True) / scored_BL.sum(1, keepdim=True), None, logits[scored_BL]


def initialise(module: nn.Module, std: float) -> None:
    """Draws weights from N(0, std) and sets biases to 0, as in pre-training."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, 0.0, std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
