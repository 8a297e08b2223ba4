"""Signs of collapse: spread, rank and alignment of targets and predictions (spec 1.5).

Everything returns tensors on the input's device and waits for nothing, so that it may run every step.
"""

import torch
from torch import Tensor


def moments(x_nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (), sum (D,) and sum of squares (D,) in float64: sum them over ranks, then `std_from_moments`."""
    x_nd = x_nd.detach().double()
    count = torch.full((), x_nd.shape[0], dtype=torch.float64, device=x_nd.device)
    return count, x_nd.sum(0), x_nd.square().sum(0)


def std_from_moments(count: Tensor, sum_d: Tensor, sumsq_d: Tensor) -> Tensor:
    """Mean over channels of sqrt(unbiased variance + 1e-6), a scalar; the reference calls it `target_var`."""
    fewer = (count - 1).clamp(min=1)
    variance_d = sumsq_d / fewer - sum_d.square() / (count.clamp(min=1) * fewer)
    return (variance_d.clamp(min=0) + 1e-6).sqrt().mean()


def effective_rank(x_nd: Tensor) -> Tensor:
    """How many directions share the variance: (sum of eigenvalues)^2 / sum of squared eigenvalues of the covariance.

    1 when all rows lie on one line, D when every direction carries the same variance. (The participation ratio: needs
    no eigenvalues, so it does not synchronise with the host.)
    """
    x_nd = x_nd.detach().float()
    x_nd = x_nd - x_nd.mean(0)
    # The smaller of the two Gram matrices has the same non-zero eigenvalues.
    gram = x_nd @ x_nd.T if x_nd.shape[0] < x_nd.shape[1] else x_nd.T @ x_nd
    tiny = torch.finfo(torch.float32).tiny
    scaled = gram / gram.diagonal().sum().clamp(min=tiny)
    return scaled.diagonal().sum().square() / scaled.square().sum().clamp(min=tiny)


def mean_cosine(x_nd: Tensor) -> Tensor:
    """Mean cosine similarity over all pairs of different rows; near 1 when all rows point the same way."""
    unit_nd = torch.nn.functional.normalize(x_nd.detach().float(), dim=-1)
    n = unit_nd.shape[0]
    return (unit_nd.sum(0).square().sum() - unit_nd.square().sum()) / max(1, n * (n - 1))
