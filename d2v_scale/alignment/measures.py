"""How alike two sets of features of the same concepts are: retrieval, mutual neighbours, the gap between them.
(Their CKA is in `data2vec.likeness`.)

N concepts; row n of both sets is of concept n. Everything is computed in float64 on the CPU and nothing is drawn. What
is measured a concept comes as a vector (N,) whose mean is the score, so that scores can be compared concept by concept.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 10
"""k of mutual k-NN."""
_TIE = 1e-6
"""Similarities that differ by less are equal: samples in batches of other lengths differ by rounding."""
_PENALTIES = torch.logspace(-4, 4, 9, dtype=torch.float64)
"""Of ridge maps, in mean squared singular values of the features."""
_ROWS_OF_COMPONENTS = 1000
"""By which principal components are found."""


def cosines(x_nd: Tensor, y_md: Tensor) -> Tensor:
    """(N, M); 0 where a vector is zero."""
    return F.normalize(x_nd.double(), dim=-1) @ F.normalize(y_md.double(), dim=-1).T


def ranks(queries_nd: Tensor, found_nd: Tensor) -> Tensor:
    """int64 (N,): the place of each query's own partner among all N by cosine similarity, from 1.

    Ties count against it: of equal candidates the partner comes last, so that features that tell nothing apart find
    nothing.
    """
    similarity_nn = cosines(queries_nd, found_nd)
    return (similarity_nn >= similarity_nn.diagonal()[:, None] - _TIE).sum(dim=1)


def recall(x_nd: Tensor, y_nd: Tensor, k: int) -> Tensor:
    """float64 (N,): whether a concept's partner is among the nearest k, mean of both directions. Both sets have one
    width."""
    return ((ranks(x_nd, y_nd) <= k).double() + (ranks(y_nd, x_nd) <= k).double()) / 2


class Ridge:
    """Ridge regressions from one set of features (N, D), decomposed once for any targets.

    Features are centred and scaled as a whole, not each channel: a rotation of them changes nothing.
    """

    def __init__(self, x_nd: Tensor) -> None:
        x_nd = x_nd.double()
        self._mean_d = x_nd.mean(dim=0)
        self._u_nr, self._s_r, self._v_rd = torch.linalg.svd(x_nd - self._mean_d, full_matrices=False)
        kept = self._s_r > 1e-10 * self._s_r.max().clamp(min=1e-30)
        self._u_nr, self._s_r, self._v_rd = self._u_nr[:, kept], self._s_r[kept], self._v_rd[kept]

    def fit(self, y_ne: Tensor) -> "RidgeMap":
        """The map to targets (N, E). The penalty is that of the least leave-one-out error, in closed form (PRESS)."""
        y_ne = y_ne.double()
        mean_e = y_ne.mean(dim=0)
        centred_ne = y_ne - mean_e
        inner_re = self._u_nr.T @ centred_ne
        best: tuple[float, Tensor, Tensor] | None = None
        scale = self._s_r.square().mean() if len(self._s_r) else torch.ones((), dtype=torch.float64)
        for penalty in (_PENALTIES * scale).flip(0):  # of equal errors the greatest penalty
            shrunk_r = self._s_r.square() / (self._s_r.square() + penalty)
            leverage_n = (self._u_nr.square() @ shrunk_r + 1 / len(y_ne)).clamp(max=1 - 1e-6)
            residual_ne = (centred_ne - self._u_nr @ (shrunk_r[:, None] * inner_re)) / (1 - leverage_n)[:, None]
            error = float(residual_ne.square().sum())
            if best is None or error < best[0] * (1 - 1e-12):
                best = error, penalty, y_ne - residual_ne
        assert best is not None
        _, penalty, left_out_ne = best
        weights_r = self._s_r / (self._s_r.square() + penalty)
        return RidgeMap(self._v_rd.T @ (weights_r[:, None] * inner_re), self._mean_d, mean_e, left_out_ne)


@dataclass(frozen=True)
class RidgeMap:
    """A fitted map."""

    weights_de: Tensor
    x_mean_d: Tensor
    y_mean_e: Tensor
    left_out_ne: Tensor
    """What each training row is mapped to by the map that is fitted without it."""

    def __call__(self, x_nd: Tensor) -> Tensor:
        """(N, E), about the training targets' mean: compare it by cosine with targets from which `y_mean_e` is
        subtracted."""
        return (x_nd.double() - self.x_mean_d) @ self.weights_de


def mutual_neighbours(x_nd: Tensor, y_ne: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """float64 (N,): which share of a concept's k nearest others in one set is among the k nearest in the other (Huh et
    al. 2024). By cosine of centred features; of ties at the k-th place each counts in part, as if drawn."""
    return shared(neighbours(x_nd, k), neighbours(y_ne, k))


def neighbours(x_nd: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """float64 (N, N): how much each other concept is one of a concept's k nearest; rows sum to k."""
    k = min(k, len(x_nd) - 1)
    centred_nd = x_nd.double() - x_nd.double().mean(dim=0)
    similarity_nn = cosines(centred_nd, centred_nd)
    similarity_nn.fill_diagonal_(-torch.inf)
    return nearest(similarity_nn, k)


def nearest(similarity_nm: Tensor, k: int) -> Tensor:
    """float64 (N, M): how much each column is one of a row's k greatest, of ties at the k-th place each in part; rows
    sum to k."""
    last_n1 = similarity_nm.topk(k, dim=1).values[:, -1:]
    nearer_nm = (similarity_nm > last_n1 + _TIE).double()
    tied_nm = ((similarity_nm - last_n1).abs() <= _TIE).double()
    open_n1 = k - nearer_nm.sum(dim=1, keepdim=True)
    return nearer_nm + tied_nm * (open_n1 / tied_nm.sum(dim=1, keepdim=True).clamp(min=1))


def shared(x_nn: Tensor, y_nn: Tensor) -> Tensor:
    """float64 (N,): `mutual_neighbours` of what `neighbours` says of both sets."""
    return (x_nn * y_nn).sum(dim=1) / x_nn.sum(dim=1)


def modality_gap(x_nd: Tensor, y_nd: Tensor) -> float:
    """Distance between the means of both sets on the unit sphere (Liang et al. 2022), 0 to 2."""
    means = [F.normalize(z_nd.double(), dim=-1).mean(dim=0) for z_nd in (x_nd, y_nd)]
    return float((means[0] - means[1]).norm())


def own_neighbours(x_nd: Tensor, y_qd: Tensor, k: int = NEIGHBOURS) -> float:
    """Which share of the k nearest others of a vector, among both sets, is of its own: 1 where they lie apart, about
    the set's share of all where they are mixed. The mean of both sets."""
    both_md = torch.cat([x_nd, y_qd])
    own_m = torch.arange(len(both_md)) < len(x_nd)
    near_mm = neighbours(both_md, k)
    share_m = (near_mm * (own_m[:, None] == own_m)).sum(dim=1) / near_mm.sum(dim=1)
    return float((share_m[own_m].mean() + share_m[~own_m].mean()) / 2)


def without(given_nc: Tensor, train_nd: Tensor, given_qc: Tensor, test_qd: Tensor) -> tuple[Tensor, Tensor]:
    """Training and held-out features from which what is linear in `given` is subtracted, by least squares on the
    training rows. Where `given` does not vary nothing is."""
    mean_c, std_c = given_nc.double().mean(dim=0), given_nc.double().std(dim=0)
    varies_c = std_c > 1e-9 * (1 + mean_c.abs())
    if not bool(varies_c.any()):
        return train_nd, test_qd

    def design(given_qc: Tensor) -> Tensor:
        scaled_qc = (given_qc.double() - mean_c)[:, varies_c] / std_c[varies_c]
        return torch.cat([torch.ones(len(scaled_qc), 1, dtype=torch.float64), scaled_qc], dim=1)

    slopes_cd = torch.linalg.lstsq(design(given_nc), train_nd.double(), driver="gelsd").solution[1:]
    return (
        train_nd.double() - design(given_nc)[:, 1:] @ slopes_cd,
        test_qd.double() - design(given_qc)[:, 1:] @ slopes_cd,
    )


def principal(train_nd: Tensor, test_qd: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Both, of wide features (more than `most`) the first `most` principal components of the training rows; of more
    than `_ROWS_OF_COMPONENTS` rows those of so many, evenly spaced. float64 (N, R), R = min(most, rows).

    By the rows' inner products: a decomposition of pixels themselves took most of the time of all controls.
    """
    if train_nd.shape[1] <= most:
        return train_nd, test_qd
    mean_d = train_nd.double().mean(dim=0)
    spaced = torch.linspace(0, len(train_nd) - 1, min(len(train_nd), _ROWS_OF_COMPONENTS)).round().long()
    some_md = train_nd[spaced].double() - mean_d
    values_m, u_mm = torch.linalg.eigh(some_md @ some_md.T)
    largest_r = values_m.flip(0)[:most].clamp(min=max(1e-12 * float(values_m[-1]), 1e-30))
    v_dr = some_md.T @ (u_mm.flip(1)[:, :most] / largest_r.sqrt())
    return (train_nd.double() - mean_d) @ v_dr, (test_qd.double() - mean_d) @ v_dr
