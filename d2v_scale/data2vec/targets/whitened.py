"""Targets with mean 0 and variance 1 in every channel over all that was seen, not over one sample or batch.

What the whole covariance costs beside single channels, of D channels and N positions: a state and sums of D^2 values
instead of D (at D = 768 2.4 MB in fp32, and 4.7 MB in fp64 that replicas add up once a step), and 3 N D^2 + D^3 / 3
FLOPs a micro-batch: as much as the linears of an eighth of a block.
"""

from typing import TYPE_CHECKING, ClassVar

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets.base import Place, State, Target

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-5


class Whitened(Target):
    """`whitened`: as `average_top_k`, then by running moments. Option `covariance`: `diagonal`: each by its own;
    `full`: all channels by their whole covariance, so that none tells what another does.

    State: `mean` (D,) and `variance` (D,), or `covariance` (D, D), of all counted positions, of steps that weigh
    `momentum` times less with every step that follows, and `weight` (), the sum of these weights over its limit. Before
    the first step nothing is changed.
    """

    defaults: ClassVar = {"momentum": 0.999}
    shares = ("momentum",)
    choices: ClassVar = {"covariance": ("diagonal", "full")}

    def __init__(self, config: TargetConfig, place: Place) -> None:
        super().__init__(config, place)
        self._spread = "covariance" if self.chosen["covariance"] == "full" else "variance"

    def targets(self, raw_btd: "Tensor", state: State) -> "Tensor":
        """(x - mean) / std, channel by channel; or with the Cholesky factor L of the covariance L^-1 (x - mean)."""
        centred_btd = raw_btd - state["mean"]
        if self._spread == "variance":
            return centred_btd * (state["variance"] + _EPS).rsqrt()
        import torch

        factor_dd = _cholesky(state["covariance"])
        whitened_dn = torch.linalg.solve_triangular(factor_dd, centred_btd.flatten(0, 1).T, upper=False)
        return whitened_dn.T.reshape(raw_btd.shape)

    def flops(self) -> float:
        """With the whole covariance its products and a triangular solve; the factor's D^3 / 3 a micro-batch are not
        counted."""
        return 0.0 if self._spread == "variance" else 3.0 * self.width**2

    def initial_state(self) -> State:
        """Mean 0, variance 1, of nothing."""
        import torch

        spread = torch.ones(self.width) if self._spread == "variance" else torch.eye(self.width)
        return {"mean": torch.zeros(self.width), self._spread: spread, "weight": torch.zeros(())}

    def statistics(self, raw_btd: "Tensor", counted_bt: "Tensor", state: State) -> "dict[str, Tensor]":
        """Count, sum, and sum of squares (D,) or products (D, D), around the running mean: so that small variances
        beside large means last."""
        centred_nd = (raw_btd - state["mean"]).flatten(0, 1)
        weighed_nd = centred_nd * counted_bt.reshape(-1, 1)
        square = (centred_nd * weighed_nd).sum(0) if self._spread == "variance" else centred_nd.T @ weighed_nd
        return {"count": counted_bt.sum(), "sum": weighed_nd.sum(0), "square": square}

    def moved(self, state: State, sums: "dict[str, Tensor]") -> State:
        """The moments of what there was and of the step, merged (Chan et al. 1979)."""
        momentum = self.options["momentum"]
        count = sums["count"].clamp(min=1)
        shift_d = sums["sum"] / count
        # A step in which nothing was counted says nothing.
        share = (sums["count"] > 0).double() * (1 - momentum)
        weight = state["weight"].double() * (1 - share) + share
        part = share / weight.clamp(min=1e-30)
        if self._spread == "variance":
            between = shift_d.square()
            within = (sums["square"] / count - between).clamp(min=0)
        else:
            between = shift_d.outer(shift_d)
            within = sums["square"] / count - between
            within = (within + within.T) / 2
        merged = state[self._spread].double() * (1 - part) + part * within + part * (1 - part) * between
        return {
            "mean": (state["mean"].double() + part * shift_d).float(),
            self._spread: merged.float(),
            "weight": weight.float(),
        }


def _cholesky(covariance_dd: "Tensor") -> "Tensor":
    """The lower factor, fp32, taken in fp64; where even then there is none, that of the channels alone. Unlike square
    roots and eigenvectors it is found without a wait for the device."""
    import torch

    whole_dd = covariance_dd.double()
    variance_d = whole_dd.diagonal()
    # Channels may depend on each other (a layer norm's add up to 0), and fp32 state is exact to a part of its size.
    ridge_d = (_EPS * variance_d.mean().clamp(min=1)).expand_as(variance_d)
    factor_dd, failed = torch.linalg.cholesky_ex(whole_dd + ridge_d.diag())
    return torch.where(failed == 0, factor_dd, (variance_d.clamp(min=0) + ridge_d).sqrt().diag()).float()
