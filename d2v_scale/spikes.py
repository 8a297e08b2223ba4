"""Spikes: steps whose gradient or loss is far larger than those before, and what a run does about them. Torch-free."""

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from d2v_scale.errors import ConfigError

NORM, LOSS = "gradient norm", "loss"
"""What a step is judged by."""
_LEAST_SPREAD = 0.02
"""Of the median: values that hardly differ are no reason to call the next one a spike."""

MOST_LEFT_OUT = 1000
"""Steps of which a run remembers where they began to read."""


@dataclass(kw_only=True)
class SpikeConfig:
    """What a step is a spike by, which is decided before the weights change, and what follows.

    The rule: its gradient norm, or its loss, is above the median + `factor` x the median absolute deviation (at least
    2 % of the median) of the last `window` that were no spikes, of steps that read the same source where sources take
    turns.
    """

    on_spike: Literal["skip", "rewind", "stop"] | None = None
    """`skip`: the step changes nothing, on any rank. `rewind`: the run goes back to its newest checkpoint and leaves
    out the samples of the spike and of `leave_out` - 1 steps before it; without a checkpoint it skips. `stop`: the run
    ends with exit code 15. null: spikes are not looked for."""
    factor: float = 20.0
    """How many deviations above the median."""
    window: int = 200
    """Norms, and losses, that the rule is made of."""
    after: int = 50
    """Steps that must be known before any is called a spike."""
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
    """A step whose gradient norm or loss was above the rule."""

    norm: float
    loss: float
    of: str
    """Which of them was: `NORM` or `LOSS`."""
    limit: float
    median: float
    known: int
    """Values that the rule was made of."""

    def __str__(self) -> str:
        return (
            f"a spike: its {self.of} is {self.loss if self.of == LOSS else self.norm:.4g}, above {self.limit:.4g} "
            f"(the median of the last {self.known} is {self.median:.4g})"
        )


class SpikeRule:
    """Judges steps one after the other, each among those that read the same. Pure: the same norms and losses lead to
    the same verdicts, on every rank."""

    def __init__(self, config: SpikeConfig) -> None:
        self._config = config
        self.read = ""
        """What the step reads that is judged next: the names of its sources. Gradients of sources that take turns
        differ, and those of one that is read rarely would all be spikes among the others'."""
        self._known: dict[str, dict[str, deque[float]]] = {}

    def judge(self, norm: float, loss: float) -> Spike | None:
        """The spike that a step of this norm and loss is; None: it is none, and counts for those to come. What is not
        finite is no spike: a step whose norm is not is skipped for itself."""
        if not (math.isfinite(norm) and math.isfinite(loss)):
            return None
        known = self._known.setdefault(self.read, self._of({}))
        for of, value in ((NORM, norm), (LOSS, loss)):
            before = known[of]
            if len(before) >= self._config.after:
                median = statistics.median(before)
                spread = statistics.median(abs(one - median) for one in before)
                # A loss may be negative: that of spread-out states is.
                limit = median + self._config.factor * max(spread, _LEAST_SPREAD * abs(median))
                if value > limit:
                    return Spike(norm, loss, of, limit, median, len(before))
        known[NORM].append(norm)
        known[LOSS].append(loss)
        return None

    def _of(self, values: Mapping[str, Iterable[float]]) -> dict[str, deque[float]]:
        return {of: deque(values.get(of, ()), maxlen=self._config.window) for of in (NORM, LOSS)}

    def state_dict(self) -> dict[str, dict[str, list[float]]]:
        """What it knows, by what was read, for the checkpoint."""
        return {read: {of: list(values) for of, values in known.items()} for read, known in self._known.items()}

    def load_state_dict(self, state: Any) -> None:
        """Continue from `state`; None: the checkpoint has none. An earlier version's has norms alone."""
        self._known = {
            read: self._of({NORM: known} if isinstance(known, list) else known) for read, known in (state or {}).items()
        }
