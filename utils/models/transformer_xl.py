"""Transformer-XL over bytes, or over the tokens of a vocabulary."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from mem_transformer import MemTransformerLM, TransformerXLConfig
from smoe_dropout.attention import ExpertQueryKeyValue
from utils.data.meta import Tokens
from utils.flags.derive import method_of, parse_counts
from utils.flags.fields import FinetuneFlags, Flags
from utils.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax, SampledSoftmax
from utils.models.attention_types import AbsoluteLM, LearnedRelativeLM
from utils.models.flops import expert_flops
from utils.models.registry import Shape

SIZES = ("n_layer", "d_model", "n_head", "d_head", "d_ff", "d_inner")
BYTES = 256
DROPPED = True  # the last hidden states have gone through dropout


def build(flags: Flags, vocabulary: Tokens | None = None) -> MemTransformerLM:
    names = ("n_layer", "n_head", "d_model", "d_head", "dropout", "dropatt", "dropout_only", "mem_len", "pre_lnorm", "same_length")
    sizes = {name: getattr(flags, name) for name in (*names, "clamp_len", "init_std")}
    sizes["segment_len"] = None if isinstance(flags, FinetuneFlags) else flags.tgt_len  # a row is read whole
    sizes["d_inner"] = flags.d_ff if flags.dense_width == "all" else flags.d_inner  # width of the layers that stay dense
    config = TransformerXLConfig(vocabulary.size if vocabulary else BYTES, tie_weight=not flags.not_tied, **sizes)
    rows = flags.mem_len + flags.tgt_len  # positions of a segment and its memory
    kinds = MemTransformerLM, partial(LearnedRelativeLM, rows=rows), AbsoluteLM, partial(AbsoluteLM, rows=rows)
    kind = kinds[flags.attn_type]
    if flags.adaptive:
        return _adaptive(kind, config, flags)
    model = kind(config)
    if flags.sample_softmax > 0:
        model.head = SampledSoftmax(model.head, flags.sample_softmax)
    return model


def _adaptive(kind: Callable[[TransformerXLConfig], MemTransformerLM], config: TransformerXLConfig, flags: Flags) -> MemTransformerLM:
    """The model with adaptive embedding and softmax. They give logits only if the objective reads them."""
    model = kind(dataclasses.replace(config, n_token=1))  # whose embedding and head are replaced
    model.config = config
    sizes, method = (config.n_token, config.d_model, parse_counts(flags.cutoffs), flags.div_val, config.init_std), method_of(flags)
    model.embedding = AdaptiveEmbedding(*sizes)
    model.head = AdaptiveSoftmax(
        *sizes,
        embedding=model.embedding,
        tied_weight=config.tie_weight,
        tied_projections=not flags.untied_projections,
        full_logits=flags.teacher is not None or bool(method and method.reads_logits),
    )
    return model


def blocks(model: MemTransformerLM) -> nn.ModuleList:
    return model.layers


def hidden_states(model: MemTransformerLM, tokens_NT: Tensor, lengths_N: Tensor) -> Tensor:
    """Attention is causal, so no position sees the padding after its row."""
    return model.hidden(tokens_NT)[0]


def summary(hidden_NTD: Tensor, lengths_N: Tensor) -> Tensor:
    """The hidden state of each row's last position."""
    return hidden_NTD[torch.arange(len(lengths_N), device=lengths_N.device), lengths_N - 1]


def without_head(model: MemTransformerLM) -> MemTransformerLM:
    del model.head  # its weight is tied to the embedding, unless --not_tied
    return model


def forward_flops(model: MemTransformerLM, shape: Shape, k: int | None) -> int:
    """Operations of one forward pass; with --adaptive and --sample_softmax an upper bound.

    Every cluster is counted as if it were computed at every target, and every embedding as one of the first cluster. With --sample_softmax,
    training is counted as if it computed all logits, as evaluation does.
    """
    c: TransformerXLConfig = model.config
    batch, segment, memory, targets = shape[:4]
    queries, keys, width = batch * segment, batch * (segment + memory), c.n_head * c.d_head
    learned, absolute = isinstance(model, LearnedRelativeLM), isinstance(model, AbsoluteLM)
    positions = 0 if learned or absolute else segment + memory
    projections = 2 * c.d_model * width * (2 * queries + 2 * keys + positions)  # q and out; k and v; positions, shared by lanes
    scores = 4 * width * queries * (segment + memory)  # content and values
    if not absolute:  # and position, with the column that shifts it; a learned one has a bias
        scores += 2 * c.n_head * (c.d_head + learned) * queries * (segment + memory + 1)
    weights = [weight.numel() for weight in model.head.parameters() if weight.ndim == 2] if hasattr(model, "head") else []
    head = 2 * batch * (segment if targets is None else targets) * sum(weights)
    embedding = 2 * queries * c.d_model**2 if getattr(model.embedding, "projections", ()) else 0
    total = c.n_layer * (projections + scores) + head + embedding
    for module in model.modules():
        if isinstance(module, ExpertQueryKeyValue):
            total += 2 * keys * module.router.weight.numel()
    return total + expert_flops(model, shape, k, c.n_layer, 4 * c.d_model * c.d_inner)
