"""Transformer-XL with the other attentions of its official code: --attn_type 1 to 3.

Shape suffixes as in mem_transformer; L rows of a learned table, of which row d belongs to distance d.
"""

import math
from collections.abc import Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mem_transformer import Memory, MemTransformerLM, RelativeAttention, TransformerXLConfig, mapped, token_losses


def table_rows(length: int, table: Tensor, clamp_len: int) -> Tensor:
    """Rows of the distances K - 1 .. 0 in a table [L, ...], int64 [K]. Distances beyond it, or beyond `clamp_len` rows, share the last."""
    used = min(len(table), clamp_len) if clamp_len > 0 else len(table)
    return torch.arange(length - 1, -1, -1, device=table.device).clamp_(max=used - 1)


class LearnedRelativeAttention(RelativeAttention):
    """softmax(((q + u) k + shift(q r + b)) / sqrt(C)) v, where u, and the key r and bias b of every distance, are learned (official type 1;
    Shaw et al. 2018, arXiv 1803.02155, equation 4, has r alone).
    """

    def __init__(self, config: TransformerXLConfig, rows: int):
        super().__init__(config)
        del self.position
        self.content_bias = nn.Parameter(torch.empty(self.n_head, self.d_head).normal_(0.0, config.init_std))
        self.distance_keys = nn.Parameter(torch.empty(rows, self.n_head, self.d_head).normal_(0.0, config.init_std))
        self.distance_bias = nn.Parameter(torch.zeros(rows, self.n_head))

    def distances(self, row_K: Tensor) -> Tensor:
        """r and b of distances by their rows [H, K, C + 1]."""
        return torch.cat([self.distance_keys, self.distance_bias[:, :, None]], -1)[row_K].transpose(0, 1).contiguous()

    def _queries(self, q_BTW: Tensor, bias: None, dtype: torch.dtype) -> Iterable[Tensor]:
        """q + u [H, B, T, C], and q with a 1 that b is multiplied by [H, B, T, C + 1], scaled."""
        q_HBTC, scale = self._by_head(q_BTW).contiguous(), 1 / math.sqrt(self.d_head)
        return [(part * scale).to(dtype) for part in (q_HBTC + self.content_bias[:, None, None], F.pad(q_HBTC, (0, 1), value=1.0))]


class LearnedRelativeLM(MemTransformerLM):
    """Relative positions from learned tables of `rows` distances, one of each layer."""

    def __init__(self, config: TransformerXLConfig, rows: int):
        super().__init__(config, partial(LearnedRelativeAttention, rows=rows))
        del self.content_bias, self.position_bias  # every layer has its own u

    def _attention_inputs(self, T: int, M: int) -> tuple[Tensor | None, ...]:
        return self._positions(M + T), None, self._mask(T, M)

    def _bias(self) -> None:
        return None

    def _positions(self, length: int) -> Tensor:
        """Rows of the distances K - 1 .. 0 [K]."""
        return table_rows(length, self.layers[0].attention.distance_keys, self.config.clamp_len)


class AbsoluteAttention(RelativeAttention):
    """softmax(q k / sqrt(C)) v, for inputs that have their positions added."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__(config)
        del self.position

    def forward(self, x_BTD: Tensor, memory_BMD: Tensor, mask_TK: Tensor) -> Tensor:
        q_BTW, kv_of_x, kv_of_memory = self.qkv(x_BTD, memory_BMD)
        k, v = (self._heads(*parts) for parts in zip(kv_of_memory, kv_of_x, strict=True))
        q, mask_TK, dropout = self._by_head(q_BTW), mask_TK.to(k.dtype), self.dropatt if self.training else 0.0
        with torch.autocast(x_BTD.device.type, enabled=False):
            y_HBTC = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TK, dropout_p=dropout)
            if self.keep_probabilities:
                scores_HBTK = q.detach() @ k.detach().transpose(-1, -2) / math.sqrt(self.d_head) + mask_TK
                self._probabilities.value = scores_HBTK.softmax(-1).transpose(0, 1)
        return self.out(y_HBTC.permute(1, 2, 0, 3).flatten(2))


class AbsoluteLM(MemTransformerLM):
    """Positions added to hidden states: sinusoidal ones to the embeddings (official type 2; Vaswani et al. 2017, arXiv 1706.03762, section
    3.5) or, if `rows` are given, learned ones in every layer (type 3; Al-Rfou et al. 2018, arXiv 1808.04444, "Positional Embeddings").

    They are counted back from the end of a segment, so that each segment adds others to its memory. That is kept without them, and begins
    with embeddings before dropout.
    """

    def __init__(self, config: TransformerXLConfig, rows: int | None = None):
        super().__init__(config, AbsoluteAttention)
        del self.content_bias, self.position_bias
        table = torch.empty(config.n_layer, rows, config.d_model).normal_(0.0, config.init_std) if rows else None
        self.register_parameter("positions", table if table is None else nn.Parameter(table))

    def hidden(self, tokens_BT: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        memory = memory or self.initial_memory(len(tokens_BT))
        states, T = [self.embedding(tokens_BT) * math.sqrt(self.config.d_model)], tokens_BT.shape[1]
        mask_TK = self._mask(T, memory[0].shape[1])
        for index, (layer, memory_BMD) in enumerate(zip(self.layers, memory[:-1], strict=True)):
            states.append(layer(self._placed(index, states[-1], 0), self._placed(index, memory_BMD, T), mask_TK))
        return self.dropout(states[-1]), self._next_memory(memory, states)

    def _placed(self, layer: int, x_BTD: Tensor, after: int) -> Tensor:
        """Segment or memory as a layer reads it, `after` positions of the segment being behind it."""
        T = x_BTD.shape[1]
        if self.positions is None:
            return x_BTD if layer else self.dropout(x_BTD + self._positions(T + after)[:T])
        row_T = table_rows(T + after, self.positions[layer], self.config.clamp_len)[:T]
        return (x_BTD if layer else self.dropout(x_BTD)) + self.positions[layer, row_T]

    @torch.no_grad()
    def read(self, tokens_BT: Tensor, cache: Memory | None = None, targets_BT: Tensor | None = None) -> tuple[Tensor, Memory]:
        """`logits`, or the loss of each target [B, T], and the next memory, which is the cache: keys and values cannot be kept, since their
        positions change. RuntimeError in training mode.
        """
        if self.training:
            raise RuntimeError("read() is for evaluation: call model.eval() first")
        hidden, cache = self.hidden(tokens_BT, cache)
        return (mapped(self.head, hidden).float() if targets_BT is None else token_losses(self.head, hidden, targets_BT)[0]), cache
