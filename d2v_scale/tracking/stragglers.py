"""Which rank holds the others up, told from what every rank spends of a step. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

STRAGGLERS_FILE = "stragglers.jsonl"
"""In the run directory: a line for every rank that was named."""
PATIENCE = 3
"""Measurements in a row, as one slow step is nothing."""
_LEAST_SHARE = 0.1
"""Of a step that a rank must cost the others to be named."""


@dataclass(frozen=True)
class Pace:
    """Seconds of one step of one rank."""

    data: float
    """Waiting for a batch."""
    compute: float
    """In the step, without communication."""
    communication: float
    """Waiting in collectives, for other ranks most of all."""
    stage: int = 0
    """Of the pipeline; a rank is compared with those of its own, which do the same work."""

    @property
    def own(self) -> float:
        """What others wait for."""
        return self.data + self.compute


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    waits_for: str
    """`data`, or `its own computation`."""
    seconds: float
    """A step, of its own."""
    others: float
    """The median of its peers."""

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is {self.seconds / max(self.others, 1e-9):.1f} times as slow as its peers, "
            f"waiting for {self.waits_for}: {self.seconds:.3g} s of a step are its own, theirs {self.others:.3g} s"
        )


class StragglerDetector:
    """Told the paces of all ranks again and again, names a rank when it has been slow for `PATIENCE` measurements in a
    row, once, until it is not."""

    def __init__(self, factor: float) -> None:
        """`factor`: how many times the median of its peers' own seconds a rank must need to count as slow."""
        self._factor = factor
        self._slow: dict[int, int] = {}

    def observe(self, paces: Sequence[Pace]) -> list[Straggler]:
        """Those who are named now. `paces`: by rank."""
        named = []
        # The slowest decides how long a step is for everybody.
        step = max(pace.own + pace.communication for pace in paces)
        for rank, pace in enumerate(paces):
            peers = [other for number, other in enumerate(paces) if number != rank and other.stage == pace.stage]
            if not peers:
                continue
            usual = statistics.median(other.own for other in peers)
            if not (pace.own > self._factor * usual and pace.own - usual > _LEAST_SHARE * step):
                self._slow.pop(rank, None)
                continue
            self._slow[rank] = self._slow.get(rank, 0) + 1
            if self._slow[rank] == PATIENCE:
                more = {
                    "data": pace.data - statistics.median(other.data for other in peers),
                    "its own computation": pace.compute - statistics.median(other.compute for other in peers),
                }
                named.append(Straggler(rank, max(more, key=more.__getitem__), pace.own, usual))
        return named
