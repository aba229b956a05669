"""Dense Transformer-XL language model (Dai et al. 2019, arXiv 1901.02860); it contains no mixture-of-experts code.

Shape suffixes: B batch, T positions of the segment, M positions of memory, K = M + T keys, H heads, C head width, D model width, V symbols.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoe_dropout.single_position import ELEMENTWISE, KeyValueCache, OfThread, attend, is_plain, mapped, product

Memory = tuple[Tensor, ...]  # n_layer + 1 tensors [B, M, D]: the embedding's output, then each layer's
Cache = tuple[KeyValueCache, ...]  # one per layer
# embeddings, positions and last hidden states; output of attention; hidden units and output of the feed-forward network
DROPOUT_PLACES = ("embedding", "attention", "hidden", "output")


@dataclass(frozen=True)
class TransformerXLConfig:
    """Sizes of the model; the defaults are the paper's enwik8 setting with a dense feed-forward layer.

    mem_len: positions of memory kept. same_length: every position attends equally far back; otherwise the first ones see less.
    clamp_len: distances beyond it share one position embedding; -1: no limit. pre_lnorm: LayerNorm before each sublayer instead of after.
    dropout_only: the one of DROPOUT_PLACES at which `dropout` acts; None: all. segment_len: positions of a segment in training, to which
    `read` keeps for layers that mix the positions of a segment; None: a whole text is one.
    """

    n_token: int
    n_layer: int = 4
    n_head: int = 8
    d_model: int = 256
    d_head: int = 64
    d_inner: int = 8192
    dropout: float = 0.1
    dropatt: float = 0.0
    dropout_only: str | None = None
    mem_len: int = 512
    pre_lnorm: bool = False
    same_length: bool = False
    clamp_len: int = -1
    tie_weight: bool = True
    init_std: float = 0.02
    segment_len: int | None = None

    def __post_init__(self):
        if self.same_length and self.mem_len == 0:
            raise ValueError("same_length makes every position attend to mem_len positions, including itself, so mem_len must not be 0")
        if self.dropout_only not in (None, *DROPOUT_PLACES):
            raise ValueError(f"dropout_only is {self.dropout_only!r}: choose one of {', '.join(DROPOUT_PLACES)}")

    def dropout_at(self, place: str) -> float:
        """Dropout rate at one of DROPOUT_PLACES."""
        return self.dropout if self.dropout_only in (None, place) else 0.0


def position_scores(qv_HBTC: Tensor, r_HKC: Tensor) -> Tensor:
    """qv r^T for every pair of position and distance [H, B*T, K + 1]; the last column is zero, for `by_key`."""
    return torch.bmm(qv_HBTC.flatten(1, 2), F.pad(r_HKC, (0, 0, 0, 1)).transpose(1, 2))


def by_key(scores: Tensor, batch_size: int) -> Tensor:
    """View scores by key instead of by distance, without a copy: [H, B*T, K + 1] -> [H, B, T, K].

    Column j of row i is the score of distance i + M - j, which is stored T - 1 - i columns further right. With rows of K + 1 values that is
    flat element T - 1 + i K + j, so skipping the first T - 1 values and reading rows of K shifts every row by the right amount. Future
    positions, j > i + M, hold unrelated values and must be masked.
    """
    T, K = scores.shape[1] // batch_size, scores.shape[2] - 1
    return scores.unflatten(1, (batch_size, T)).flatten(2)[..., T - 1 : T - 1 + T * K].unflatten(-1, (T, K))


def relative_attention_sdpa(qu_HBTC, qv_HBTC, k_HBKC, v_HBKC, r_HKC, mask_TK, dropout: float) -> Tensor:
    """softmax(qu k^T + shift(qv r^T) + mask) v -> [H, B, T, C], for queries that are already scaled.

    Uses torch's fused attention with the position term as bias. This is the definition, and what runs on GPUs and with attention dropout.
    """
    bias = by_key(position_scores(qv_HBTC, r_HKC), qu_HBTC.shape[1]) + mask_TK
    return F.scaled_dot_product_attention(qu_HBTC, k_HBKC, v_HBKC, attn_mask=bias, dropout_p=dropout, scale=1.0)


@torch.no_grad()
def relative_probabilities(qu_HBTC, qv_HBTC, k_HBKC, r_HKC, mask_TK: Tensor | None) -> Tensor:
    """Attention probabilities [H, B, T, K], which `relative_attention_sdpa` does not return. mask: None if it would be zero."""
    if qv_HBTC.shape[2] == 1:  # nothing to shift
        distance_HBTK = (qv_HBTC.flatten(1, 2) @ r_HKC.transpose(1, 2))[:, :, None]
    else:
        distance_HBTK = by_key(position_scores(qv_HBTC, r_HKC), qv_HBTC.shape[1])
    scores_HBTK = (qu_HBTC @ k_HBKC.transpose(-1, -2)).add_(distance_HBTK)
    return (scores_HBTK if mask_TK is None else scores_HBTK.add_(mask_TK)).softmax(-1)


class RelativeAttentionCPU(torch.autograd.Function):
    """`relative_attention_sdpa` for CPUs, with as few passes over the scores as possible and no copies of operands.

    Saves only the probabilities for backward. In products with transposed scores the narrow operand and the result are transposed instead,
    because torch copies transposed operands in bf16. torch's softmax gradient is several times slower than three vectorised passes.
    """

    @staticmethod
    def forward(ctx, qu_HBTC, qv_HBTC, k_HBKC, v_HBKC, r_HKC, mask_TK):
        """Output [H, B, T, C] and probabilities [H, B, T, K], which are not differentiable."""
        p = torch.bmm(qu_HBTC.flatten(0, 1), k_HBKC.flatten(0, 1).transpose(1, 2))
        p.add_(by_key(position_scores(qv_HBTC, r_HKC), qu_HBTC.shape[1]).flatten(0, 1)).add_(mask_TK)
        torch.softmax(p, -1, out=p)
        ctx.save_for_backward(qu_HBTC, qv_HBTC, k_HBKC, v_HBKC, r_HKC, p)
        probabilities_HBTK = p.unflatten(0, qu_HBTC.shape[:2])
        ctx.mark_non_differentiable(probabilities_HBTK)
        return torch.bmm(p, v_HBKC.flatten(0, 1)).view_as(qu_HBTC), probabilities_HBTK

    @staticmethod
    def backward(ctx, grad_HBTC, _):
        """Gradients of the inputs of `forward`."""
        if torch.is_grad_enabled():
            raise RuntimeError("RelativeAttentionCPU cannot be differentiated twice: use relative_attention_sdpa")
        qu_HBTC, qv_HBTC, k_HBKC, v_HBKC, r_HKC, p = ctx.saved_tensors
        (H, B, T, _), K, grad = qu_HBTC.shape, k_HBKC.shape[2], grad_HBTC.flatten(0, 1)
        grad_v = torch.bmm(grad.transpose(1, 2), p).transpose(1, 2).view_as(v_HBKC)
        grad_p = torch.bmm(grad, v_HBKC.flatten(0, 1).transpose(1, 2)).mul_(p)
        by_distance = p.new_empty(H, B * T, K + 1)
        edges = by_distance.unflatten(1, (B, T)).flatten(2)  # values before and after the view were not used
        edges[..., : T - 1], edges[..., T - 1 + T * K :] = 0, 0
        grad_scores = by_key(by_distance, B).flatten(0, 1)
        torch.addcmul(grad_p, p, grad_p.sum(-1, keepdim=True), value=-1, out=grad_scores)
        grad_qu = torch.bmm(grad_scores, k_HBKC.flatten(0, 1)).view_as(qu_HBTC)
        grad_k = torch.bmm(qu_HBTC.flatten(0, 1).transpose(1, 2), grad_scores).transpose(1, 2).view_as(k_HBKC)
        by_distance = by_distance[..., :K]
        grad_qv = torch.bmm(by_distance, r_HKC).view_as(qv_HBTC)
        grad_r = torch.bmm(qv_HBTC.flatten(1, 2).transpose(1, 2), by_distance).transpose(1, 2)
        return grad_qu, grad_qv, grad_k, grad_v, grad_r, None


class QueryKeyValue(nn.Linear):
    """x [B, T, D], memory [B, M, D] -> queries of x [B, T, W], keys and values of x, keys and values of memory."""

    takes_memory = True

    def __init__(self, d_model: int, width: int):
        super().__init__(d_model, 3 * width, bias=False)
        self.width = width

    def forward(self, x_BTD: Tensor, memory_BMD: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        q_BTW, *kv_of_x = product(x_BTD, self.weight).split(self.width, -1)
        # a separate product, since memory needs no gradient
        if memory_BMD.shape[1] == 0 and not torch.is_grad_enabled():
            return q_BTW, tuple(kv_of_x), tuple(part[:, :0] for part in kv_of_x)
        return q_BTW, tuple(kv_of_x), F.linear(memory_BMD, self.weight[self.width :]).split(self.width, -1)


class RelativeAttention(nn.Module):
    """Multi-head attention with relative positions: softmax(((q + u) k + shift((q + v) r)) / sqrt(C)) v.

    If `keep_probabilities` is set, `probabilities` holds those of the thread's last pass [B, H, T, K], detached and before dropout. If
    `keep_past` is set, `past.value` is the cache that the thread reads with, which carries values of earlier positions of the segment.
    """

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.n_head, self.d_head, self.dropatt = config.n_head, config.d_head, config.dropatt
        self.keep_probabilities, self._probabilities = False, OfThread()
        self.keep_past, self.past = False, OfThread()
        width = config.n_head * config.d_head
        self.qkv = QueryKeyValue(config.d_model, width)
        self.position = nn.Linear(config.d_model, width, bias=False)
        self.out = nn.Linear(width, config.d_model, bias=False)

    @property
    def probabilities(self) -> Tensor | None:
        return self._probabilities.value

    def _heads(self, *projected: Tensor) -> Tensor:
        """Parts [B, T, H*C], concatenated in time -> contiguous [H, B, K, C], so that products do not copy r for every sequence."""
        return torch.cat([self._by_head(part) for part in projected], 2).contiguous()

    def _by_head(self, part_BTW: Tensor) -> Tensor:
        """View [B, T, H*C] -> [H, B, T, C]."""
        return part_BTW.view(*part_BTW.shape[:2], self.n_head, self.d_head).permute(2, 0, 1, 3)

    def forward(self, x_BTD: Tensor, memory_BMD: Tensor, position_KD: Tensor, bias_2H11C: Tensor, mask_TK: Tensor) -> Tensor:
        q_BTW, kv_of_x, kv_of_memory = self.qkv(x_BTD, memory_BMD)
        k, v = (self._heads(*parts) for parts in zip(kv_of_memory, kv_of_x, strict=True))
        qu, qv = self._queries(q_BTW, bias_2H11C, k.dtype)
        dropout = self.dropatt if self.training else 0.0
        inputs = qu, qv, k, v, self.distances(position_KD).to(k.dtype), mask_TK.to(k.dtype)
        with torch.autocast(x_BTD.device.type, enabled=False):
            if x_BTD.device.type == "cpu" and dropout == 0 and not torch.compiler.is_compiling():  # torch.compile cannot trace it
                y_HBTC, p_HBTK = RelativeAttentionCPU.apply(*inputs)
            else:
                y_HBTC = relative_attention_sdpa(*inputs, dropout)
                p_HBTK = relative_probabilities(qu, qv, k, *inputs[4:]) if self.keep_probabilities else None
            self._probabilities.value = p_HBTK.transpose(0, 1) if self.keep_probabilities else None
        return self.out(y_HBTC.permute(1, 2, 0, 3).flatten(2))

    def read(self, x_BTD: Tensor, cache: KeyValueCache, memory: int, bias_2H11C: Tensor, mask_TK: Tensor | None) -> Tensor:
        """`forward` with at most `memory` cached positions in place of memory. Adds x to the cache.

        mask: None if it would be zero, as for a single position.
        """
        q_BTW, kv_of_x, _ = self.qkv(x_BTD, x_BTD[:, :0])
        k, v = cache.extend(*(self._by_head(part) for part in kv_of_x), memory)
        qu, qv = self._queries(q_BTW, bias_2H11C, k.dtype)
        r = cache.r_HLC[:, -k.shape[2] :].to(k.dtype)
        if mask_TK is None and len(x_BTD) <= ELEMENTWISE and is_plain(k) and qu.shape == qv.shape:
            p_HBTK, y_HBTC = attend(qu, qv, k, v, r)
        else:
            with torch.autocast(x_BTD.device.type, enabled=False):
                p_HBTK = relative_probabilities(qu.contiguous(), qv.contiguous(), k, r, None if mask_TK is None else mask_TK.to(k.dtype))
                y_HBTC = p_HBTK @ v
        self._probabilities.value = p_HBTK.transpose(0, 1) if self.keep_probabilities else None
        return mapped(self.out, y_HBTC.permute(1, 2, 0, 3).flatten(2))

    def distances(self, position_KD: Tensor) -> Tensor:
        """Keys of distances [H, K, C]."""
        return self.position(position_KD).unflatten(-1, (self.n_head, self.d_head)).transpose(0, 1).contiguous()

    def _queries(self, q_BTW: Tensor, bias_2H11C: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
        """q + u and q + v, scaled [H, B, T, C]."""
        return ((self._by_head(q_BTW).contiguous() + bias_2H11C) * (1 / math.sqrt(self.d_head))).to(dtype)


class FeedForward(nn.Module):
    """Position-wise two-layer network [..., D] -> [..., D]. `core` is the part that may be replaced."""

    def __init__(self, config: TransformerXLConfig):
        super().__init__()
        self.core = nn.Sequential(
            nn.Linear(config.d_model, config.d_inner),
            nn.ReLU(),
            nn.Dropout(config.dropout_at("hidden")),
            nn.Linear(config.d_inner, config.d_model),
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.core(x_BTD)


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each with dropout, residual and LayerNorm, which comes before the sublayer with `pre_lnorm`."""

    def __init__(self, config: TransformerXLConfig, attention: Callable[[TransformerXLConfig], nn.Module] = RelativeAttention):
        super().__init__()
        self.pre_lnorm = config.pre_lnorm
        self.attention, self.attention_norm = attention(config), nn.LayerNorm(config.d_model)
        self.feed_forward, self.feed_forward_norm = FeedForward(config), nn.LayerNorm(config.d_model)
        self.attention_dropout, self.dropout = (nn.Dropout(config.dropout_at(place)) for place in ("attention", "output"))

    def forward(self, x_BTD: Tensor, memory_BMD: Tensor, *attention_inputs: Tensor) -> Tensor:
        if self.pre_lnorm:
            memory_BMD = self.attention_norm(memory_BMD)
        return self._around(x_BTD, lambda x_BTD: self.attention(x_BTD, memory_BMD, *attention_inputs))

    def read(self, x_BTD: Tensor, cache: KeyValueCache, *attention_inputs) -> Tensor:
        """`forward` with cached positions in place of memory."""
        with self.attention.past.holding(cache if self.attention.keep_past else None):
            return self._around(x_BTD, lambda x_BTD: self.attention.read(x_BTD, cache, *attention_inputs))

    def _around(self, x_BTD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_lnorm:
            x_BTD = x_BTD + self.attention_dropout(attend(self.attention_norm(x_BTD)))
            return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        x_BTD = self.attention_norm(x_BTD + self.attention_dropout(attend(x_BTD)))
        return self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))


def token_losses(head: nn.Module, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each target in nats [B, T], and logits [B, T, V] in float32; a head that has `losses` computes them itself."""
    if hasattr(head, "losses"):
        return head.losses(hidden_BTD, targets_BT)
    logits_BTV = mapped(head, hidden_BTD).float()
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT), logits_BTV


class MemTransformerLM(nn.Module):
    """Language model over segments: `losses, memory, logits = model(tokens, targets, memory)`; pass the memory to the next call."""

    def __init__(self, config: TransformerXLConfig, attention: Callable[[TransformerXLConfig], nn.Module] = RelativeAttention):
        super().__init__()
        self.config = config
        self.mem_len = config.mem_len  # may be changed for evaluation
        self.embedding = nn.Embedding(config.n_token, config.d_model)
        self.layers = nn.ModuleList(DecoderLayer(config, attention) for _ in range(config.n_layer))
        self.content_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))  # u in the paper, r_w_bias in its code
        self.position_bias = nn.Parameter(torch.empty(config.n_head, config.d_head))  # v, r_r_bias
        self.head = nn.Linear(config.d_model, config.n_token)
        if config.tie_weight:
            self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(config.dropout_at("embedding"))
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        """Official initialisation: weights N(0, std), LayerNorm gains N(1, std), biases of linear maps 0."""
        std = self.config.init_std
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0.0, std)
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, std)
        if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, MemTransformerLM):
            nn.init.normal_(module.content_bias, 0.0, std)
            nn.init.normal_(module.position_bias, 0.0, std)

    def initial_memory(self, batch_size: int) -> Memory:
        """Empty memory: n_layer + 1 tensors [B, 0, D]."""
        return (self.layers[0].attention_norm.weight.new_empty(batch_size, 0, self.config.d_model),) * (self.config.n_layer + 1)

    def hidden(self, tokens_BT: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """tokens [B, T] -> last hidden states [B, T, D] and the memory for the next segment."""
        memory = memory or self.initial_memory(tokens_BT.shape[0])
        x = self.dropout(self.embedding(tokens_BT) * math.sqrt(self.config.d_model))
        T, M = tokens_BT.shape[1], memory[0].shape[1]
        attention_inputs, states = self._attention_inputs(T, M), [x]
        for layer, memory_BMD in zip(self.layers, memory[:-1], strict=True):
            states.append(layer(states[-1], memory_BMD, *attention_inputs))
        return self.dropout(states[-1]), self._next_memory(memory, states)

    def logits(self, tokens_BT: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """tokens [B, T] -> logits [B, T, V] in float32 and the next memory."""
        hidden, memory = self.hidden(tokens_BT, memory)
        return self.head(hidden).float(), memory

    @torch.no_grad()
    def read(self, tokens_BT: Tensor, cache: Cache | None = None, targets_BT: Tensor | None = None) -> tuple[Tensor, Cache]:
        """`logits`, or the loss of each target [B, T], for evaluation and generation: caches keys and values of positions already read
        instead of hidden states.

        Pass the returned cache to the next call; the one passed in is modified. A layer that mixes the positions of a segment, as some
        methods of routing do, sees those of `segment_len` positions, in however many calls they are read. RuntimeError in training mode.
        """
        if self.training:
            raise RuntimeError("read() is for evaluation: call model.eval() first")
        cache = cache or tuple(KeyValueCache() for _ in self.layers)
        x = torch.cat([self._read(part, cache) for part in self._segments(tokens_BT, cache)], 1)
        return (mapped(self.head, x).float() if targets_BT is None else token_losses(self.head, x, targets_BT)[0]), cache

    def _read(self, tokens_BT: Tensor, cache: Cache) -> Tensor:
        """Last hidden states [B, T, D] of positions that go on where the cache ends, and are added to it."""
        T, M = tokens_BT.shape[1], min(cache[0].length, self.mem_len)
        if cache[0].r_HLC is None or cache[0].r_HLC.shape[1] < M + T:
            position_LD = self._positions(self.mem_len + T)
            for layer, cached in zip(self.layers, cache, strict=True):
                cached.r_HLC = layer.attention.distances(position_LD)
        mask_TK = None if T == 1 and not self.config.same_length else self._mask(T, M)
        attention_inputs = self.mem_len, self._bias(), mask_TK
        x = self.embedding(tokens_BT) * math.sqrt(self.config.d_model)
        for layer, cached in zip(self.layers, cache, strict=True):
            if self.config.segment_len and cached.count % self.config.segment_len == 0:  # a segment begins
                cached.carried.clear()
            x = layer.read(x, cached, *attention_inputs)
        return x

    def _segments(self, tokens_BT: Tensor, cache: Cache) -> Sequence[Tensor]:
        """The tokens by segment, if a layer mixes those of one."""
        length = self.config.segment_len
        if length is None or not any(layer.attention.keep_past for layer in self.layers):
            return (tokens_BT,)
        return tokens_BT.tensor_split([*range(length - cache[0].count % length, tokens_BT.shape[1], length)], 1)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory, Tensor]:
        """Cross-entropy of each target in nats [B, T], the next memory, and logits [B, T, V]."""
        hidden, memory = self.hidden(tokens_BT, memory)
        losses, logits = token_losses(self.head, hidden, targets_BT)
        return losses, memory, logits

    def _attention_inputs(self, T: int, M: int) -> tuple[Tensor | None, ...]:
        return self.dropout(self._positions(M + T)), self._bias(), self._mask(T, M)

    def _bias(self) -> Tensor | None:
        """u and v [2, H, 1, 1, C]."""
        return torch.stack([self.content_bias, self.position_bias])[:, :, None, None]

    def _positions(self, length: int) -> Tensor:
        """Sinusoidal embeddings of the distances K - 1 .. 0 [K, D]."""
        own = self.layers[0].attention_norm.weight
        like = {"device": own.device, "dtype": torch.promote_types(own.dtype, torch.float32)}
        distance = torch.arange(length - 1, -1, -1.0, **like)
        if self.config.clamp_len > 0:
            distance = distance.clamp(max=self.config.clamp_len)
        frequency = 1 / (10000 ** (torch.arange(0.0, self.config.d_model, 2.0, **like) / self.config.d_model))
        angle = torch.outer(distance, frequency)
        return torch.cat([angle.sin(), angle.cos()], -1).to(own.dtype)

    def _mask(self, T: int, M: int) -> Tensor:
        """Additive mask [T, M + T]: -inf for future positions and, with `same_length`, for those beyond the common range."""
        ones = torch.ones(T, M + T, dtype=torch.bool, device=self.layers[0].attention_norm.weight.device)
        hidden = ones.triu(1 + M)
        if self.config.same_length:
            hidden = hidden | ones.tril(-(T - max(M + T - self.mem_len, 0)))
        return torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -math.inf)

    def _next_memory(self, memory: Memory, states: list[Tensor]) -> Memory:
        if self.mem_len == 0:
            return self.initial_memory(states[0].shape[0])
        with torch.no_grad():
            pairs = zip(memory, states, strict=True)
            return tuple(torch.cat([old, new.to(old.dtype)], 1)[:, -self.mem_len :].detach() for old, new in pairs)
