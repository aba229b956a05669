"""Embedding and softmax for large vocabularies whose symbols are sorted by falling frequency; of the project, nothing is imported.

Adaptive softmax: Grave et al. 2017 (arXiv 1609.04309, section 4). Adaptive embedding and shared tables: Baevski and Auli 2019 (arXiv
1809.10853, section 3). Sampled softmax: Jean et al. 2015 (arXiv 1412.2007, section 3). What these leave open is as in Transformer-XL's code
(kimiyoung/transformer-xl), so that its weights fit.

Shape suffixes: B lanes, T positions of a segment, N positions, M those in a cluster, D model width, E width of a cluster, V symbols, S
symbols of the first cluster, C clusters after it, R symbols drawn.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Clusters(nn.Module):
    """The symbols from each cutoff to the next, with a table [V, E] and a projection [D, E] for each cluster; E = D // div_val**i.

    div_val 1: one table as wide as the model for all clusters, and no projection. Tables are drawn from N(0, init_std^2), projections from
    N(0, proj_init_std^2). ValueError unless every cluster has symbols and a width.
    """

    def __init__(
        self, n_token: int, d_model: int, cutoffs: Sequence[int], div_val: int, init_std: float, proj_init_std: float = 0.01
    ) -> None:
        super().__init__()
        self.starts = (0, *cutoffs)
        self.sizes = [end - start for start, end in zip(self.starts, (*cutoffs, n_token), strict=True)]
        widths = [d_model // div_val**index for index in range(len(self.sizes))]
        if not cutoffs or min(self.sizes) < 1 or min(widths) < 1:
            wrong = f"cutoffs {tuple(cutoffs)} and div_val {div_val} divide {n_token} symbols of width {d_model}"
            raise ValueError(f"{wrong} into clusters of {self.sizes} symbols of width {widths}, and all of these must be at least 1")
        tables = [(n_token, d_model)] if div_val == 1 else zip(self.sizes, widths, strict=True)
        self.tables = nn.ParameterList(torch.empty(shape).normal_(0.0, init_std) for shape in tables)
        projections = [] if div_val == 1 else [(d_model, width) for width in widths]
        self.projections = nn.ParameterList(torch.empty(shape).normal_(0.0, proj_init_std) for shape in projections)

    def members(self, symbols_N: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """The cluster of each symbol [N], and of each cluster the positions [M] whose symbols are in it. Waits for the device once."""
        cluster_N = torch.stack([symbols_N >= start for start in self.starts[1:]]).sum(0)
        return cluster_N, cluster_N.argsort(stable=True).split(cluster_N.bincount(minlength=len(self.sizes)).tolist())


class AdaptiveEmbedding(Clusters):
    """Symbols [...] -> embeddings [..., D], each of its cluster's width and projected to D; not scaled by sqrt(D)."""

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.projections:
            return F.embedding(tokens, self.tables[0])
        tokens_N = tokens.flatten()
        _, members = self.members(tokens_N)
        clusters = zip(members, self.starts, self.tables, self.projections, strict=True)
        # of an empty cluster, too: its parameters then have a gradient of zeros, which data parallelism needs
        x_ND = torch.cat([F.linear(F.embedding(tokens_N[at_M] - start, table), projection) for at_M, start, table, projection in clusters])
        x_ND = torch.empty_like(x_ND).index_copy(0, torch.cat(members), x_ND)
        return x_ND.view(*tokens.shape, -1).to(self.tables[0].dtype)  # as of a plain embedding, whatever the precision of products


class AdaptiveSoftmax(Clusters):
    """log p(symbol) = log p(symbol in the first cluster), or log p(cluster) + log p(symbol in cluster), with p by softmax.

    The softmax of the first cluster has a column more for each other one, in reverse order: that of cluster i is its i-th from the end.
    `embedding` lends its tables, if `tied_weight`, and its projections but the first, if `tied_projections`. full_logits: `losses` returns
    the distribution as well, at the cost of computing all of it.
    """

    def __init__(
        self,
        n_token: int,
        d_model: int,
        cutoffs: Sequence[int],
        div_val: int,
        init_std: float,
        proj_init_std: float = 0.01,
        *,
        embedding: AdaptiveEmbedding,
        tied_weight: bool = True,
        tied_projections: bool = True,
        full_logits: bool = False,
    ):
        super().__init__(n_token, d_model, cutoffs, div_val, init_std, proj_init_std)
        self.full_logits = full_logits
        if tied_weight:
            self.tables = nn.ParameterList(embedding.tables)
        if tied_projections and self.projections:
            self.projections = nn.ParameterList([self.projections[0], *list(embedding.projections)[1:]])
        self.biases = nn.ParameterList(torch.zeros(len(table)) for table in self.tables)
        self.cluster_weight = nn.Parameter(torch.empty(len(cutoffs), self.tables[0].shape[1]).normal_(0.0, init_std))
        self.cluster_bias = nn.Parameter(torch.zeros(len(cutoffs)))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> log-probabilities [..., V] in float32."""
        first, *others = (_logits(hidden, *one).log_softmax(-1) for one in self._maps())
        later = [first[..., -index, None] + within for index, within in enumerate(others, 1)]
        return torch.cat([first[..., : self.sizes[0]], *later], -1)

    def losses(self, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """-log p of each target in nats [B, T], float32, and with `full_logits` all log-probabilities [B, T, V], else None.

        A cluster after the first is computed at those positions whose target is in it.
        """
        if self.full_logits:
            log_p_BTV = self(hidden_BTD)
            return -log_p_BTV.gather(-1, targets_BT[..., None])[..., 0], log_p_BTV
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
        cluster_N, (_, *members) = self.members(targets_N)
        first, *others = self._maps()
        column_N = torch.where(cluster_N == 0, targets_N, len(first[0]) - cluster_N)
        losses_N = F.cross_entropy(_logits(hidden_ND, *first), column_N, reduction="none")
        for at_M, start, one in zip(members, self.starts[1:], others, strict=True):  # at none, too: see AdaptiveEmbedding
            logits_MV = _logits(hidden_ND.index_select(0, at_M), *one)
            losses_N = losses_N.index_add(0, at_M, F.cross_entropy(logits_MV, targets_N[at_M] - start, reduction="none"))
        return losses_N.view_as(targets_BT), None

    def _maps(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Table, bias and projection of each cluster, the first with the other clusters' columns after its symbols."""
        tables, biases = (given if self.projections else given[0].split(self.sizes) for given in (self.tables, self.biases))
        first = torch.cat([tables[0], self.cluster_weight]), torch.cat([biases[0], self.cluster_bias])
        projections = self.projections or [None] * len(self.sizes)
        return list(zip((first[0], *tables[1:]), (first[1], *biases[1:]), projections, strict=True))


def _logits(hidden: Tensor, table_VE: Tensor, bias_V: Tensor, projection_DE: Tensor | None) -> Tensor:
    """Logits [..., V] in float32."""
    return F.linear(hidden if projection_DE is None else hidden @ projection_DE, table_VE, bias_V).float()


class SampledSoftmax(nn.Module):
    """A linear head whose training loss is over the target and symbols drawn for the whole batch; in evaluation over all symbols.

    Of 2 `samples` draws with replacement from p(v) = log((v + 2) / (v + 1)) / log(V + 1), the different ones count. From every logit the
    logarithm of its symbol's probability to be among them is subtracted, so that the loss tends to that over all symbols.
    """

    def __init__(self, linear: nn.Linear, samples: int):
        super().__init__()
        self.weight, self.bias, self.samples = linear.weight, linear.bias, samples

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V]."""
        return F.linear(hidden, self.weight, self.bias)

    def losses(self, hidden_BTD: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Cross-entropy of each target in nats [B, T], float32; in evaluation also the logits [B, T, V], in training None."""
        hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
        if self.training:
            logits_NR = self._sampled(hidden_ND, targets_N)
            return F.cross_entropy(logits_NR, torch.zeros_like(targets_N), reduction="none").view_as(targets_BT), None
        logits_NV = self(hidden_ND).float()
        return F.cross_entropy(logits_NV, targets_N, reduction="none").view_as(targets_BT), logits_NV.view(*targets_BT.shape, -1)

    def _sampled(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        """Corrected logits of the target and of the drawn symbols [N, 1 + R]; where the target is drawn, -inf in that place."""
        drawn_R = self.draw(targets_N.device)
        target_N = (hidden_ND * F.embedding(targets_N, self.weight)).sum(-1).float() + self.bias[targets_N] - self.log_included(targets_N)
        logits_NR = F.linear(hidden_ND, F.embedding(drawn_R, self.weight), self.bias[drawn_R]).float() - self.log_included(drawn_R)
        return torch.cat([target_N[:, None], logits_NR.masked_fill(targets_N[:, None] == drawn_R, -math.inf)], 1)

    def draw(self, device: torch.device) -> Tensor:
        """Different symbols [R] in ascending order, from the device's default generator."""
        uniform = torch.rand(2 * self.samples, dtype=torch.float64, device=device)
        return ((uniform * math.log(len(self.weight) + 1)).exp().long() - 1).clamp(max=len(self.weight) - 1).unique()

    def log_included(self, symbols: Tensor) -> Tensor:
        """Logarithm of the probability that 2 `samples` draws have the symbols among them, float32."""
        p = (1 / (symbols.double() + 1)).log1p() / math.log(len(self.weight) + 1)
        return (-(2 * self.samples * (-p).log1p()).expm1()).log().float()
