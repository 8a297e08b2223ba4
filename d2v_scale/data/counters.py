"""What one rank was given, what was lost and where."""

import logging
from collections import Counter, deque
from dataclasses import dataclass, field

from d2v_scale.shards.plan import Cursor, PlannedBatch
from d2v_scale.shards.reading import Fault
from d2v_scale.shards.rows import Row

log = logging.getLogger(__name__)

_NAMED_PER_SHARD = 3
_SAMPLES_BEFORE_ALARM = 100
_RECENT_SAMPLES = 500
_RECENT_RATIO = 0.5


@dataclass
class Tally:
    """What became of the planned rows of one micro-batch; made where they are decoded."""

    delivered: dict[int, int]
    """Rows by epoch."""
    lost: dict[int, int]
    """Rows by epoch. Streamed shards also count what is damaged without having been planned."""
    real: int
    """Values of the inputs that are no padding: tokens, or samples of audio, or patches of arrays; 0 for images."""
    padded: int
    """Values of the inputs, padding included."""
    missing: int = 0
    """Patches of arrays that were neither seen nor predicted, since they miss a value."""
    blank: int = 0
    """Rows that stayed blank because a stream's share of the shards holds nothing; none of them is lost."""
    missing_parts: Counter[str] = field(default_factory=Counter)
    """Delivered rows of paired samples without a part, by the part's stem."""
    named_parts: list[Fault] = field(default_factory=list)
    """Which ones, and why."""
    cropped_parts: Counter[str] = field(default_factory=Counter)
    """Delivered rows of paired samples with a part that is longer than what is read of it, by the part's stem."""

    def count_parts(self, row: Row, shard: str) -> None:
        """What a delivered row does not have, or not all of."""
        self.missing_parts.update(part for part, _ in row.lacking)
        self.named_parts += [Fault(shard, row.key, f"no {part}: {why}") for part, why in row.lacking]
        self.cropped_parts.update(row.cropped)


@dataclass
class EpochCount:
    """Items of one epoch of one source."""

    planned: int = 0
    """Of all ranks."""
    left_out: int = 0
    """Too short to be planned, or too long for a transcript; of all ranks."""
    delivered: int = 0
    lost: int = 0


@dataclass
class SourceCount:
    """Totals of one source."""

    real: int = 0
    padded: int = 0
    missing: int = 0
    cropped: int = 0
    """Of all ranks: samples of audio that rows lost, each taking its batch's shortest length."""
    uncropped: int = 0
    """Of all ranks: samples of audio that there would be without."""
    missing_parts: Counter[str] = field(default_factory=Counter)
    cropped_parts: Counter[str] = field(default_factory=Counter)
    epochs: dict[int, EpochCount] = field(default_factory=dict)

    def epoch(self, number: int) -> EpochCount:
        """The counts of an epoch, which begin at 0."""
        return self.epochs.setdefault(number, EpochCount())

    @property
    def delivered(self) -> int:
        return sum(epoch.delivered for epoch in self.epochs.values())


class Counters:
    """Totals of one rank since its process started. Every lost sample is counted; the first of a shard are named."""

    def __init__(
        self,
        sources: list[str],
        max_bad_ratio: float,
        samples_per_epoch: float = 0,
        slack: int = 1,
    ) -> None:
        """`samples_per_epoch`: this rank's share of all sources, 0 where that is not known. `slack`: a greater factor
        lets more of the latest rows be lost."""
        self._sources = sources
        self._max_bad_ratio = max_bad_ratio
        self._samples_per_epoch = max(samples_per_epoch, _SAMPLES_BEFORE_ALARM)
        self._recent: deque[tuple[int, int]] = deque()
        self.lost_by_shard: Counter[str] = Counter()
        self._parts_by_shard: Counter[str] = Counter()
        self._counts = {name: SourceCount() for name in sources}
        self._untaken = {name: SourceCount() for name in sources}
        self._epochs = dict.fromkeys(sources, 0)
        self._planned = 0
        self._blank = 0
        self._slack = slack
        self._last: Fault | None = None

    def count(self, planned: PlannedBatch, tallies: list[Tally], faults: list[Fault], cursors: list[Cursor]) -> None:
        """One step: `planned` for all ranks, and what became of this rank's micro-batches."""
        name = self._sources[planned.source]
        for counts in (self._counts[name], self._untaken[name]):
            for epoch, rows in planned.rows_by_epoch().items():
                counts.epoch(epoch).planned += rows
            for epoch, rows in planned.left_out.items():
                counts.epoch(epoch).left_out += rows
            counts.cropped += planned.cropped
            counts.uncropped += planned.cropped + planned.measured_length
            for tally in tallies:
                counts.real += tally.real
                counts.padded += tally.padded
                counts.missing += tally.missing
                counts.missing_parts.update(tally.missing_parts)
                counts.cropped_parts.update(tally.cropped_parts)
                for epoch, rows in tally.delivered.items():
                    counts.epoch(epoch).delivered += rows
                for epoch, rows in tally.lost.items():
                    counts.epoch(epoch).lost += rows
        for fault in faults:
            self._name(fault)
        for fault in (one for tally in tallies for one in tally.named_parts):
            self._name_part(fault)
        self._planned += len(planned)
        blank = sum(tally.blank for tally in tallies)
        self._blank += blank
        self._recent.append((blank + sum(sum(tally.delivered.values()) for tally in tallies), len(faults)))
        while sum(map(sum, self._recent)) - sum(self._recent[0]) >= _RECENT_SAMPLES * self._slack:
            self._recent.popleft()
        self._epochs = {name: cursor.epoch for name, cursor in zip(self._sources, cursors, strict=True)}

    def _name(self, fault: Fault) -> None:
        self.lost_by_shard[fault.shard] += 1
        self._last = fault
        seen = self.lost_by_shard[fault.shard]
        if seen <= _NAMED_PER_SHARD:
            log.warning("lost a sample: %s", fault)
        elif seen & (seen - 1) == 0:
            log.warning("%s: %d samples lost so far", fault.shard, seen)

    def _name_part(self, fault: Fault) -> None:
        self._parts_by_shard[fault.shard] += 1
        seen = self._parts_by_shard[fault.shard]
        if seen <= _NAMED_PER_SHARD:
            log.warning("a sample goes on without a part: %s", fault)
        elif seen & (seen - 1) == 0:
            log.warning("%s: %d samples without a part so far", fault.shard, seen)

    def take(self) -> dict[str, SourceCount]:
        """This rank's counts by source since the last call (`RunTotals` adds them up)."""
        taken, self._untaken = self._untaken, {name: SourceCount() for name in self._sources}
        return taken

    @property
    def lost(self) -> int:
        return self.lost_by_shard.total()

    @property
    def delivered(self) -> int:
        return sum(counts.delivered for counts in self._counts.values())

    def values(self) -> dict[str, float]:
        """`delivered` and `lost` of this rank, `planned` samples of all ranks, and for each source its `epoch` and
        `delivered`."""
        values: dict[str, float] = {"delivered": self.delivered, "lost": self.lost, "planned": self._planned}
        for name in self._sources:
            values[f"{name}/epoch"] = self._epochs[name]
            values[f"{name}/delivered"] = self._counts[name].delivered
        return values

    def alarm(self) -> str | None:
        """Says so when more than `max_bad_ratio` of this rank's samples were lost, or half of the last ones.

        Measured against an epoch at least, so that one bad shard of very many does not end a run in its first steps.
        """
        seen = self.delivered + self.lost + self._blank
        recent = sum(lost for _, lost in self._recent), sum(map(sum, self._recent))
        starved = recent[0] > max(_RECENT_RATIO, self._max_bad_ratio) * max(
            recent[1], _SAMPLES_BEFORE_ALARM * self._slack
        )
        if not starved and self.lost <= self._max_bad_ratio * max(seen, self._samples_per_epoch):
            return None
        worst, count = self.lost_by_shard.most_common(1)[0]
        return (
            f"{self.lost} of {seen} samples could not be read, {recent[0]} of the last {recent[1]} "
            f"(data.max_bad_ratio={self._max_bad_ratio}); "
            f"most of them ({count}) in {worst}; the last: {self._last}. Check the shards with `d2v inspect`."
        )
