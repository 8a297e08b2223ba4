"""Targets from a codebook that follows the taps, and grows."""

from typing import TYPE_CHECKING, ClassVar

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.data2vec.targets.base import Place, State, Target
from d2v_scale.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_FORGOTTEN = 1e-3
"""A code with this part of a mean code's use is given up."""
_OFFSET = 0.5
"""How far the halves of a code move from its centre, along the channel that varies most, in standard deviations of it.

Along all channels at once they would leave a plane on which several groups of vectors lie, and share each of them."""


class Codes(Target):
    """`codes`: as `average_top_k`, then the nearest vector of a codebook in its place.

    A code is the running mean of the vectors that it stood for. The book begins with one code. At every step the code
    that leaves most unexplained splits in two (as Linde, Buzo and Gray 1980), while there is room and more than
    `grow_above` of the variance is unexplained; a code that hardly stands for anything is given up, which makes room.

    State, C = `codes`: `used` (C,), 1 for codes there are; `count` (C,) and `sum` (C, D), running sums over the vectors
    of each. Before the first step all targets are 0.
    """

    defaults: ClassVar = {"codes": 256, "momentum": 0.99, "grow_above": 0.0}
    shares = ("momentum", "grow_above")

    def __init__(self, config: TargetConfig, place: Place) -> None:
        super().__init__(config, place)
        self.codes = int(self.options["codes"])
        if self.codes != self.options["codes"] or self.codes < 1:
            raise ConfigError(
                "objective.target.options", f"codes is {self.options['codes']}.", "Give a whole number above 0."
            )

    def targets(self, raw_btd: "Tensor", state: State) -> "Tensor":
        """The nearest code."""
        return _centres(state)[self._nearest(raw_btd, state)]

    def flops(self) -> float:
        """Comparisons with every code, in `targets` and again in `statistics`, and what is summed for each code."""
        return 8.0 * self.codes * self.width

    def scratch(self) -> int:
        """Distances to every code, twice while they are masked."""
        return 2 * self.codes

    def initial_state(self) -> State:
        """One code, of nothing."""
        import torch

        used_c = torch.zeros(self.codes)
        used_c[0] = 1
        return {"used": used_c, "count": torch.zeros(self.codes), "sum": torch.zeros(self.codes, self.width)}

    def statistics(self, raw_btd: "Tensor", counted_bt: "Tensor", state: State) -> "dict[str, Tensor]":
        """For each code the count, sum and sum of squares of its vectors."""
        import torch

        raw_nd = raw_btd.flatten(0, 1)
        nearest_n = self._nearest(raw_nd, state)
        # As a product, whose order of summation is fixed: scattered additions on a GPU have none.
        choice_cn = (torch.arange(self.codes, device=raw_nd.device)[:, None] == nearest_n).to(raw_nd.dtype)
        choice_cn *= counted_bt.flatten()
        return {"count": choice_cn.sum(1), "sum": choice_cn @ raw_nd, "square": choice_cn @ raw_nd.square()}

    def moved(self, state: State, sums: "dict[str, Tensor]") -> State:
        """Running sums one step on; then codes are given up, then one splits."""
        momentum = self.options["momentum"]
        moved = {name: momentum * state[name].double() + (1 - momentum) * sums[name] for name in ("count", "sum")}
        moved = _without_forgotten({"used": state["used"].double(), **moved})
        return {name: x.float() for name, x in self._with_split(moved, sums).items()}

    def _nearest(self, vectors: "Tensor", state: State) -> "Tensor":
        """int64 (...): the code nearest to each of (..., D)."""
        centres_cd = _centres(state)
        # Without |x|^2, which is the same for all codes.
        distances = centres_cd.square().sum(1) - 2 * (vectors @ centres_cd.T)
        return distances.masked_fill(state["used"] == 0, float("inf")).argmin(-1)

    def _with_split(self, state: State, sums: "dict[str, Tensor]") -> State:
        """What is unexplained is asked of this step alone: running sums remember it from before the last split."""
        import torch

        count_c1 = sums["count"][:, None].clamp(min=1)
        variance_cd = (sums["square"] / count_c1 - (sums["sum"] / count_c1).square()).clamp(min=0)
        error_c = (variance_cd * sums["count"][:, None]).sum(1) * state["used"]
        total = sums["count"].sum().clamp(min=1)
        whole_d = (sums["square"].sum(0) / total - (sums["sum"].sum(0) / total).square()).clamp(min=0)
        unexplained = error_c.sum() / (whole_d.sum() * total).clamp(min=1e-30)
        worst, free = error_c.argmax(), state["used"].argmin()
        there_is_room = state["used"].min() == 0
        grows = there_is_room & (error_c.max() > 0) & (unexplained > self.options["grow_above"])
        half, centre_d = _at(worst, state["count"]) / 2, _at(worst, _centres(state))
        variance_d = _at(worst, variance_cd)
        widest_d = torch.arange(self.width, device=error_c.device) == variance_d.argmax()
        offset_d = _OFFSET * variance_d.sqrt() * widest_d
        found = dict(state)
        for place, sign in ((worst, -1), (free, 1)):
            here_c = grows & (torch.arange(self.codes, device=error_c.device) == place)
            found["used"] = torch.where(here_c, 1.0, found["used"])
            found["count"] = torch.where(here_c, half, found["count"])
            found["sum"] = torch.where(here_c[:, None], half * (centre_d + sign * offset_d), found["sum"])
        return found


def _at(place: "Tensor", x: "Tensor") -> "Tensor":
    """`x[place]`, for which the host would wait to read the place."""
    return x.index_select(0, place[None]).squeeze(0)


def _centres(state: State) -> "Tensor":
    return state["sum"] / state["count"][:, None].clamp(min=1e-30)


def _without_forgotten(state: State) -> State:
    import torch

    mean = state["count"].sum() / state["used"].sum()
    kept_c = (state["used"] > 0) & (state["count"] >= _FORGOTTEN * mean)
    return {name: torch.where(kept_c if x.dim() == 1 else kept_c[:, None], x, 0.0) for name, x in state.items()}
