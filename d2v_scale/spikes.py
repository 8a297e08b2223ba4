"""Spikes: steps whose gradient is far larger than those before, and what a run does about them. Torch-free."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from d2v_scale.errors import ConfigError

_LEAST_SPREAD = 0.02
"""Of the median: norms that hardly differ are no reason to call the next one a spike."""

MOST_LEFT_OUT = 1000
"""Steps of which a run remembers where they began to read."""


@dataclass(kw_only=True)
class SpikeConfig:
    """What a step is a spike by, which is decided before the weights change, and what follows.

    The rule: its gradient norm is above the median + `factor` x the median absolute deviation (at least 2 % of the
    median) of the last `window` norms that were no spikes, of steps that read the same source where sources take turns.
    """

    on_spike: Literal["skip", "rewind", "stop"] | None = None
    """`skip`: the step changes nothing, on any rank. `rewind`: the run goes back to its newest checkpoint and leaves
    out the samples of the spike and of `leave_out` - 1 steps before it; without a checkpoint it skips. `stop`: the run
    ends with exit code 15. null: spikes are not looked for."""
    factor: float = 20.0
    """How many deviations above the median."""
    window: int = 200
    """Norms that the rule is made of."""
    after: int = 50
    """Norms that must be known before any step is called a spike."""
    leave_out: int = 1
    """Steps whose samples a rewind leaves out, the spike's included; at most those since the checkpoint."""
    most: int = 10
    """Spikes within 1,000 steps after which the run ends: a rule that finds more is wrong, or the run is."""

    def check(self) -> None:
        """Raises ConfigError for a rule that could never be applied."""
        if self.leave_out > MOST_LEFT_OUT:
            raise ConfigError(
                "optim.spikes.leave_out", f"is {self.leave_out}", f"Give {MOST_LEFT_OUT} at most: a run knows no more."
            )
        if not 2 <= self.after <= self.window:
            raise ConfigError(
                "optim.spikes.after", f"is {self.after}, and the window {self.window}", "Give 2 to optim.spikes.window."
            )


@dataclass(frozen=True)
class Spike:
    """A step whose gradient norm was above the rule."""

    norm: float
    limit: float
    median: float
    known: int
    """Norms that the rule was made of."""

    def __str__(self) -> str:
        return (
            f"a spike: its gradient norm is {self.norm:.4g}, above {self.limit:.4g} "
            f"(the median of the last {self.known} is {self.median:.4g})"
        )


class SpikeRule:
    """Judges norms one after the other, each among those of steps that read the same. Pure: the same norms lead to the
    same verdicts, on every rank."""

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self.read = ""
        """What the step reads whose norm is judged next: the names of its sources. Gradients of sources that take turns
        differ, and those of one that is read rarely would all be spikes among the others'."""
        self._norms: dict[str, deque[float]] = {}

    def judge(self, norm: float) -> Spike | None:
        """The spike that a step of this norm is; None: it is none, and counts for those to come. A norm that is not
        finite is no spike: such a step is skipped for itself."""
        if not math.isfinite(norm):
            return None
        norms = self._norms.setdefault(self.read, deque(maxlen=self._config.window))
        if len(norms) >= self._config.after:
            median = statistics.median(norms)
            spread = statistics.median(abs(one - median) for one in norms)
            limit = median + self._config.factor * max(spread, _LEAST_SPREAD * median)
            if norm > limit:
                return Spike(norm, limit, median, len(norms))
        norms.append(norm)
        return None

    def state_dict(self) -> dict[str, list[float]]:
        """The norms it knows, by what was read, for the checkpoint."""
        return {read: list(norms) for read, norms in self._norms.items()}

    def load_state_dict(self, state: Any) -> None:
        """Continue from `state`; None: the checkpoint has none."""
        self._norms = {read: deque(norms, maxlen=self._config.window) for read, norms in (state or {}).items()}
