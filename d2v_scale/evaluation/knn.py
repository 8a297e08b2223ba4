"""k nearest neighbours by cosine similarity: how well frozen features separate classes, without training anything."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(features_nd: Tensor, queries_qd: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Cosine similarities (Q, k) and indices (Q, k) of each query's nearest rows of `features_nd`, best first."""
    bank_dn = F.normalize(features_nd.float(), dim=-1).T
    k = min(k, features_nd.shape[0])
    found = [(F.normalize(part.float(), dim=-1) @ bank_dn).topk(k, dim=-1) for part in queries_qd.split(chunk)]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


def whitened(features_nd: Tensor, queries_qd: Tensor, shrinkage: float = 0.1) -> tuple[Tensor, Tensor]:
    """Both, centred and turned so that `features_nd` vary alike in every direction; labels play no part.

    Mean-pooled Transformer states vary mostly along a few directions (brightness, loudness, frequent words), beside
    which cosine similarity sees little else. Whitened, k-NN does not depend on how features are mixed or scaled, as a
    linear probe does not. `shrinkage`, in mean variances, keeps directions that hold next to nothing from counting.
    """
    mean_d = features_nd.double().mean(dim=0)
    centred_nd = features_nd.double() - mean_d
    variance_d, axes_dd = torch.linalg.eigh(centred_nd.T @ centred_nd / features_nd.shape[0])
    map_dd = axes_dd / (variance_d.clamp(min=0) + shrinkage * variance_d.mean() + 1e-12).sqrt()
    return (centred_nd @ map_dd).float(), ((queries_qd.double() - mean_d) @ map_dd).float()


def whitened_knn(features_nd: Tensor, labels_n: Tensor, queries_qd: Tensor, labels_q: Tensor, k: int = 20) -> float:
    """`knn` of what `whitened` makes of both; NaN where a feature is not finite, which the decomposition raises for."""
    if not (features_nd.isfinite().all() and queries_qd.isfinite().all()):
        return float("nan")
    features_nd, queries_qd = whitened(features_nd, queries_qd)
    return knn(features_nd, labels_n, queries_qd, labels_q, k)


def knn(
    features_nd: Tensor,
    labels_n: Tensor,
    queries_qd: Tensor,
    labels_q: Tensor,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy in [0, 1] of a k-NN classifier on cosine similarity.

    Each neighbour votes with weight exp(similarity / temperature) (Wu et al. 2018, the convention of DINO). Labels
    are integers from 0. `features_nd` are the labelled examples, `queries_qd` the held-out ones.
    """
    similarity_qk, index_qk = nearest(features_nd, queries_qd, k)
    classes = int(torch.cat([labels_n, labels_q]).max()) + 1
    votes_qc = torch.zeros(queries_qd.shape[0], classes, device=similarity_qk.device)
    # The best neighbour's weight is 1, so that the exponential cannot overflow.
    weights_qk = ((similarity_qk - similarity_qk[:, :1]) / temperature).exp()
    votes_qc.scatter_add_(1, labels_n.to(index_qk.device)[index_qk], weights_qk)
    return (votes_qc.argmax(dim=1) == labels_q.to(votes_qc.device)).float().mean().item()
