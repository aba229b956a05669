"""Spectral clustering of a few points (Ng, Jordan and Weiss 2001), deterministic for a given seed."""

import torch
import torch.nn.functional as F
from torch import Tensor

RESTARTS, ROUNDS = 10, 100


def spectral_clusters(affinity_EE: Tensor, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Partition into `count` non-empty clusters, in order of their first members.

    affinity_EE: symmetric and non-negative. Runs k-means on the leading eigenvectors of the normalised affinity matrix.
    """
    degree_E = affinity_EE.sum(1).clamp(min=1e-12)
    normalised_EE = affinity_EE / (degree_E[:, None] * degree_E).sqrt()
    vectors_EC = F.normalize(torch.linalg.eigh(normalised_EE).eigenvectors[:, -count:])
    labels = k_means(vectors_EC, count, torch.Generator().manual_seed(seed)).tolist()
    return sorted(tuple(index for index, label in enumerate(labels) if label == cluster) for cluster in range(count))


def k_means(points_EC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Cluster of each point [E]: the best of several restarts by the sum of squared distances."""
    found = [_k_means_once(points_EC, count, generator) for _ in range(RESTARTS)]
    return min(
        found, key=lambda labels_E: float(_squares(points_EC, _centres(points_EC, labels_E, count)).gather(1, labels_E[:, None]).sum())
    )


def _k_means_once(points_EC: Tensor, count: int, generator: torch.Generator) -> Tensor:
    labels_E = _assigned(points_EC, points_EC[_seeds(points_EC, count, generator)])
    for _ in range(ROUNDS):
        after_E = _assigned(points_EC, _centres(points_EC, labels_E, count))
        if torch.equal(after_E, labels_E):
            break
        labels_E = after_E
    return labels_E


def _seeds(points_EC: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """k-means++ seeds: each is drawn with probability proportional to its squared distance from the nearest one so far. All differ."""
    chosen = [int(torch.randint(len(points_EC), (1,), generator=generator))]
    while len(chosen) < count:
        distance_E = _squares(points_EC, points_EC[chosen]).amin(1) + 1e-12
        distance_E[chosen] = 0
        chosen.append(int(torch.multinomial(distance_E, 1, generator=generator)))
    return chosen


def _assigned(points_EC: Tensor, centres_KC: Tensor) -> Tensor:
    """Nearest centre of each point; an empty centre gets the point farthest from its own."""
    squares_EK = _squares(points_EC, centres_KC)
    labels_E = squares_EK.argmin(1)
    for empty in set(range(len(centres_KC))) - set(labels_E.tolist()):
        company_E = torch.bincount(labels_E, minlength=len(centres_KC))[labels_E] > 1
        distance_E = squares_EK.gather(1, labels_E[:, None])[:, 0]
        labels_E[distance_E.masked_fill(~company_E, -1.0).argmax()] = empty
    return labels_E


def _centres(points_EC: Tensor, labels_E: Tensor, count: int) -> Tensor:
    member_KE = F.one_hot(labels_E, count).T.to(points_EC)
    return member_KE @ points_EC / member_KE.sum(1, keepdim=True)


def _squares(points_EC: Tensor, centres_KC: Tensor) -> Tensor:
    """Squared distances [E, K]."""
    return (points_EC[:, None] - centres_KC).square().sum(-1)
