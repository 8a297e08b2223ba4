"""Targets with mean 0 and variance 1 in every channel over all that was seen, not over one sample or batch."""

from typing import ClassVar

import torch
from torch import Tensor

from d2v_scale.data2vec.targets.base import State, Target

_EPS = 1e-5


class Whitened(Target):
    """`whitened`: as `average_top_k`, then each channel by running moments of its own.

    State: `mean` and `variance` (D,) of all counted positions, of steps that weigh `momentum` times less with every
    step that follows, and `weight` (), the sum of these weights over its limit. Before the first step
    nothing is changed.
    """

    defaults: ClassVar = {"momentum": 0.999}
    shares = ("momentum",)

    def targets(self, raw_btd: Tensor, state: State) -> Tensor:
        """(x - mean) / std, channel by channel."""
        return (raw_btd - state["mean"]) * torch.rsqrt(state["variance"] + _EPS)

    def initial_state(self) -> State:
        """Mean 0, variance 1, of nothing."""
        return {"mean": torch.zeros(self.width), "variance": torch.ones(self.width), "weight": torch.zeros(())}

    def statistics(self, raw_btd: Tensor, counted_bt: Tensor, state: State) -> dict[str, Tensor]:
        """Count, sum and sum of squares, around the running mean: so that small variances beside large means last."""
        centred_btd = raw_btd - state["mean"]
        weight_bt1 = counted_bt[..., None]
        return {
            "count": counted_bt.sum(),
            "sum": (centred_btd * weight_bt1).sum((0, 1)),
            "square": (centred_btd.square() * weight_bt1).sum((0, 1)),
        }

    def moved(self, state: State, sums: dict[str, Tensor]) -> State:
        """The moments of what there was and of the step, merged (Chan et al. 1979)."""
        momentum = self.options["momentum"]
        count = sums["count"].clamp(min=1)
        shift_d = sums["sum"] / count
        variance_d = (sums["square"] / count - shift_d.square()).clamp(min=0)
        # A step in which nothing was counted says nothing.
        share = (sums["count"] > 0).double() * (1 - momentum)
        weight = state["weight"].double() * (1 - share) + share
        part = share / weight.clamp(min=1e-30)
        kept_d = state["variance"].double() * (1 - part)
        merged_d = kept_d + part * variance_d + part * (1 - part) * shift_d.square()
        return {
            "mean": (state["mean"].double() + part * shift_d).float(),
            "variance": merged_d.float(),
            "weight": weight.float(),
        }
