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


def standardised(features_nd: Tensor, queries_qd: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the mean and spread per dimension of `features_nd` removed.

    Mean-pooled Transformer states share a large common part, beside which cosine similarity sees little else.
    """
    mean_d, spread_d = features_nd.mean(dim=0), features_nd.std(dim=0).clamp(min=1e-6)
    return (features_nd - mean_d) / spread_d, (queries_qd - mean_d) / spread_d


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
