"""What was delivered, what was lost and where, and how long the step waited for it."""

import logging
from collections import Counter, deque

import torch

from d2v_scale.data.batch import Batch
from d2v_scale.data.plan import Cursor
from d2v_scale.data.reading import Fault

log = logging.getLogger(__name__)

_NAMED_PER_SHARD = 3
_SAMPLES_BEFORE_ALARM = 100
_RECENT_SAMPLES = 500
_RECENT_RATIO = 0.5


class Counters:
    """Totals of one rank since its process started. Every lost sample is counted; the first of a shard are named."""

    def __init__(self, sources: list[str], max_bad_ratio: float, samples_per_epoch: float = 0) -> None:
        """`samples_per_epoch`: this rank's share of all sources, 0 where that is not known."""
        self._sources = sources
        self._max_bad_ratio = max_bad_ratio
        self._samples_per_epoch = max(samples_per_epoch, _SAMPLES_BEFORE_ALARM)
        self._recent: deque[tuple[int, int]] = deque()
        self.delivered = 0
        self.lost_by_shard: Counter[str] = Counter()
        self._delivered_by_source: Counter[str] = Counter()
        self._epochs = dict.fromkeys(sources, 0)
        self._planned = 0
        self._waited = 0.0
        self._real, self._padded = 0, 0
        self._last: Fault | None = None

    def count(
        self, batches: list[Batch], faults: list[Fault], planned_rows: int, waited_s: float, cursors: list[Cursor]
    ) -> None:
        """One step of this rank. `planned_rows` is of all ranks."""
        for batch in batches:
            rows = int((batch.sample_ids >= 0).sum()) if batch.sample_ids.device.type == "cpu" else len(batch.keys)
            rows = 0 if batch.keys == ("",) else rows
            self.delivered += rows
            self._delivered_by_source[batch.source] += rows
            if batch.valid is not None and batch.valid.device == torch.device("cpu"):
                self._real += int(batch.valid.sum())
                self._padded += batch.valid.numel()
        for fault in faults:
            self.lost_by_shard[fault.shard] += 1
            self._last = fault
            seen = self.lost_by_shard[fault.shard]
            if seen <= _NAMED_PER_SHARD:
                log.warning("lost a sample: %s", fault)
            elif seen & (seen - 1) == 0:
                log.warning("%s: %d samples lost so far", fault.shard, seen)
        self._planned += planned_rows
        self._recent.append((sum(len(batch.keys) for batch in batches if batch.keys != ("",)), len(faults)))
        while sum(map(sum, self._recent)) - sum(self._recent[0]) >= _RECENT_SAMPLES:
            self._recent.popleft()
        self._waited += waited_s
        self._epochs = {name: cursor.epoch for name, cursor in zip(self._sources, cursors, strict=True)}

    @property
    def lost(self) -> int:
        return self.lost_by_shard.total()

    def values(self) -> dict[str, float]:
        """`delivered`, `lost` and `wait_s` of this rank, `planned` samples of all ranks, `padding` (share of inputs),
        and for each source its `epoch` and `delivered`."""
        values: dict[str, float] = {
            "delivered": self.delivered,
            "lost": self.lost,
            "planned": self._planned,
            "wait_s": self._waited,
            "padding": 1 - self._real / self._padded if self._padded else 0.0,
        }
        for name in self._sources:
            values[f"{name}/epoch"] = self._epochs[name]
            values[f"{name}/delivered"] = self._delivered_by_source[name]
        return values

    def alarm(self) -> str | None:
        """Says so when more than `max_bad_ratio` of this rank's samples were lost, or half of the last 500.

        Measured against an epoch at least, so that one bad shard of very many does not end a run in its first steps.
        """
        seen = self.delivered + self.lost
        recent = sum(lost for _, lost in self._recent), sum(map(sum, self._recent))
        starved = recent[0] > max(_RECENT_RATIO, self._max_bad_ratio) * max(recent[1], _SAMPLES_BEFORE_ALARM)
        if not starved and self.lost <= self._max_bad_ratio * max(seen, self._samples_per_epoch):
            return None
        worst, count = self.lost_by_shard.most_common(1)[0]
        return (
            f"{self.lost} of {seen} samples could not be read, {recent[0]} of the last {recent[1]} "
            f"(data.max_bad_ratio={self._max_bad_ratio}); "
            f"most of them ({count}) in {worst}; the last: {self._last}. Check the shards with tools/inspect_shards.py."
        )
