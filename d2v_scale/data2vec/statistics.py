"""Signs of collapse: spread, rank and alignment of targets and predictions (spec 1.5); likeness of representations;
and what representations are worth without labels (RankMe, LiDAR).

Everything returns tensors on the input's device. All but RankMe and LiDAR, which need eigenvalues, wait for nothing, so
that they may run every step.
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


def rankme(x_nd: Tensor) -> Tensor:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exp of the entropy of the singular values' shares in their sum,
    for features as they are, neither centred nor scaled. float64, a scalar.

    1 where all rows lie on one line through 0, r where r directions count alike, min(N, D) at most; 0 where all is 0;
    NaN where a feature is not finite. Without the 1e-7 that the paper adds to every share, so that these are exact.
    """
    x_nd = x_nd.detach().double()
    if not x_nd.isfinite().all():  # which the decomposition raises for
        return x_nd.new_tensor(float("nan"))
    return _spread_over(torch.linalg.svdvals(x_nd))


def lidar(x_nvd: Tensor, delta: float = 1e-4) -> Tensor:
    """LiDAR (Thilak et al. 2024, arXiv 2312.04000): how many directions tell samples apart rather than views of one
    sample. float64, a scalar. `x_nvd`: features of V >= 2 views of N samples.

    exp of the entropy of the eigenvalues' shares in their sum, of S_w^(-1/2) S_b S_w^(-1/2): S_b the covariance of the
    samples' means, S_w that within samples, plus `delta` of the mean variance of a channel on its diagonal. (The paper
    adds `delta` itself, and 1e-7 to every share: then neither the features' scale nor their width would cancel.) 0
    where all samples have the same mean; min(N - 1, D) at most; NaN where a feature is not finite.
    """
    x_nvd = x_nvd.detach().double()
    if not x_nvd.isfinite().all():
        return x_nvd.new_tensor(float("nan"))
    samples, views, width = x_nvd.shape
    mean_nd = x_nvd.mean(dim=1)
    between_nd = (mean_nd - mean_nd.mean(dim=0)) / samples**0.5
    within_md = (x_nvd - mean_nd[:, None]).flatten(0, 1) / (samples * views) ** 0.5
    level = (between_nd.square().sum() + within_md.square().sum()) / width
    # Rounding is no variation; and where nothing varies there is nothing to divide by.
    flat = between_nd.square().sum() <= 1e-20 * mean_nd.square().mean(dim=0).sum()
    level = level.clamp(min=torch.finfo(torch.float64).tiny ** 0.5)
    ridge_dd = delta * level * torch.eye(width, dtype=torch.float64, device=x_nvd.device)
    factor_dd = torch.linalg.cholesky(within_md.T @ within_md + ridge_dd)
    # The eigenvalues are the squared singular values of this.
    whitened_dn = torch.linalg.solve_triangular(factor_dd, between_nd.T, upper=False)
    return _spread_over(torch.linalg.svdvals(whitened_dn).square() * ~flat)


def _spread_over(value_k: Tensor) -> Tensor:
    """exp of the entropy of the shares of non-negative values; 0 where all are 0."""
    share_k = value_k / value_k.sum().clamp(min=torch.finfo(value_k.dtype).tiny)
    return torch.special.entr(share_k).sum().exp() * (value_k.sum() > 0)


def mean_cosine(x_nd: Tensor) -> Tensor:
    """Mean cosine similarity over all pairs of different rows; near 1 when all rows point the same way."""
    unit_nd = torch.nn.functional.normalize(x_nd.detach().float(), dim=-1)
    n = unit_nd.shape[0]
    return (unit_nd.sum(0).square().sum() - unit_nd.square().sum()) / max(1, n * (n - 1))


def linear_cka(x_nd: Tensor, y_ne: Tensor, weight_n: Tensor | None = None) -> Tensor:
    """Linear centred kernel alignment of two sets of features of the same N samples, in [0, 1].

    ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) with centred columns (Kornblith et al. 2019, eq. 4). `weight_n`: how much each
    sample counts, 0 to leave it out.
    """
    kind = torch.float64 if x_nd.device.type == "cpu" else torch.float32
    weight_n1 = torch.ones_like(x_nd[:, :1], dtype=kind) if weight_n is None else weight_n.to(kind)[:, None]

    def centred(z_nd: Tensor) -> Tensor:
        z_nd = z_nd.detach().to(kind)
        return (z_nd - (z_nd * weight_n1).sum(0) / weight_n1.sum().clamp(min=1e-30)) * weight_n1.sqrt()

    x_nd, y_ne = centred(x_nd), centred(y_ne)
    cross = (y_ne.T @ x_nd).square().sum()
    own = (x_nd.T @ x_nd).norm() * (y_ne.T @ y_ne).norm()
    return cross / own.clamp(min=1e-30)
