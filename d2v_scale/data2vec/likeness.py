"""How alike two sets of features of the same samples are, whatever their widths: CKA without the bias of few samples.

Everything is computed in float64; what is said of a sample comes as a vector (N,) whose mean is the score.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 5
"""Samples that unbiased HSIC of all but one of them needs."""


def debiased_cka(x_nd: Tensor, y_ne: Tensor) -> Tensor:
    """float64 (N,), its mean the linear CKA with unbiased HSIC (Song et al. 2012; Nguyen et al. 2021): about 0 for
    features that have nothing in common however wide they are, 1 for equal ones. 0 where a set does not vary.

    The values are jackknife pseudo-values, moved to that mean: their spread is that of the score over samples. Needs
    `LEAST`.
    """
    return Kernel.of(x_nd).cka(Kernel.of(y_ne))


@dataclass(frozen=True)
class Kernel:
    """A set's linear kernel, and its unbiased HSIC with itself."""

    gram_nn: Tensor
    """Of centred features of mean square 1, without the diagonal."""
    own: Tensor
    own_n: Tensor
    """Without each sample."""

    @classmethod
    def of(cls, x_nd: Tensor) -> "Kernel":
        """Of features (N, D)."""
        centred_nd = x_nd.double() - x_nd.double().mean(dim=0)
        size = centred_nd.square().sum(dim=1).mean().sqrt()
        level = x_nd.double().square().sum(dim=1).mean().sqrt()
        if size <= 1e-7 * level:  # rounding is no variation
            centred_nd = torch.zeros_like(centred_nd)
        scaled_nd = centred_nd / size.clamp(min=1e-30)
        gram_nn = (scaled_nd @ scaled_nd.T).fill_diagonal_(0)
        return cls(gram_nn, *_hsic(gram_nn, gram_nn))

    def reordered(self, order_n: Tensor) -> "Kernel":
        """Of the same features in another order."""
        return Kernel(self.gram_nn[order_n][:, order_n], self.own, self.own_n[order_n])

    def cka(self, other: "Kernel") -> Tensor:
        """See `debiased_cka`."""
        both, both_n = _hsic(self.gram_nn, other.gram_nn)
        whole, left_out_n = _ratio(both, self.own, other.own), _ratio(both_n, self.own_n, other.own_n)
        n = len(self.gram_nn)
        pseudo_n = n * whole - (n - 1) * left_out_n
        return pseudo_n - pseudo_n.mean() + whole


def _hsic(k_nn: Tensor, l_nn: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased HSIC of all N, and (N,) of all but one, each up to the factor of its own N that cancels in CKA."""
    n = len(k_nn)
    both_n = (k_nn * l_nn).sum(dim=1)
    k_n, l_n = k_nn.sum(dim=1), l_nn.sum(dim=1)
    product = (k_n * l_n).sum()

    def statistic(both: Tensor, k: Tensor, l: Tensor, cross: Tensor, count: int) -> Tensor:  # noqa: E741
        return both + k * l / ((count - 1) * (count - 2)) - 2 * cross / (count - 2)

    whole = statistic(both_n.sum(), k_n.sum(), l_n.sum(), product, n)
    cross_n = product - k_nn @ l_n - l_nn @ k_n + both_n - k_n * l_n
    left_out_n = statistic(both_n.sum() - 2 * both_n, k_n.sum() - 2 * k_n, l_n.sum() - 2 * l_n, cross_n, n - 1)
    return whole, left_out_n


def _ratio(kl: Tensor, kk: Tensor, ll: Tensor) -> Tensor:
    own = kk.clamp(min=0) * ll.clamp(min=0)
    return torch.where(own > 1e-20, kl / own.clamp(min=1e-20).sqrt(), torch.zeros_like(kl))
