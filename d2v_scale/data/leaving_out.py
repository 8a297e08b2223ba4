"""Ranges of the planned order that no step reads: named in the recipe, or by a rewind."""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace

from d2v_scale.data.config import LeaveOut
from d2v_scale.data.streaming import StreamPlan
from d2v_scale.errors import ConfigError
from d2v_scale.shards.plan import Cursor, PlannedBatch, SourcePlan
from d2v_scale.spikes import MOST_LEFT_OUT


class LeavingOut:
    """Which batches of every source are passed over, and where the latest steps were read.

    A batch is passed over if the source's cursor lies in a range when it is its turn. Ranges that begin and end where
    steps do, as those of a rewind, leave all other batches as they are.
    """

    def __init__(self, names: Sequence[str], ranges: Sequence[LeaveOut], streams: Collection[str] = ()) -> None:
        """`names`: of the sources; `streams`: of those without an index. Raises ConfigError for a range of none of
        them, and for one of a stream: what it reads has no positions."""
        self._names = list(names)
        self._ranges: list[list[tuple[Cursor, Cursor]]] = [[] for _ in names]
        self._read: deque[list[Cursor]] = deque(maxlen=MOST_LEFT_OUT)
        """Where the latest steps began to read."""
        for one in ranges:
            if one.source not in names:
                raise ConfigError(
                    "data.leave_out", f"names the source {one.source!r}", f"The sources are {', '.join(names)}."
                )
            if one.source in streams:
                raise ConfigError(
                    "data.leave_out",
                    f"names {one.source}, which has no index: no range of it has a name",
                    "Make one with `d2v index`, or leave the range out.",
                )
            self.add(one)

    def add(self, one: LeaveOut) -> None:
        """Pass over a range from now on."""
        self._ranges[self._names.index(one.source)].append((Cursor(*one.begin), Cursor(*one.end)))

    def next_batch(self, plan: SourcePlan | StreamPlan, source: int, cursor: Cursor) -> tuple[PlannedBatch, Cursor]:
        """The batch of a source at `cursor` or behind the ranges there, which it counts as left out, and the cursor
        after it."""
        passed: dict[int, int] = {}
        while any(begin <= cursor < end for begin, end in self._ranges[source]):
            planned, cursor = plan.next_batch(cursor)
            for counts in (planned.rows_by_epoch(), planned.left_out):
                for epoch, rows in counts.items():
                    passed[epoch] = passed.get(epoch, 0) + rows
        planned, cursor = plan.next_batch(cursor)
        if passed:
            for epoch, rows in planned.left_out.items():
                passed[epoch] = passed.get(epoch, 0) + rows
            planned = replace(planned, left_out=passed)
        return planned, cursor

    def note(self, cursors: Sequence[Cursor]) -> None:
        """A step was read from here on."""
        self._read.append(list(cursors))

    def forget(self) -> None:
        """The next step is not the one after the last."""
        self._read.clear()

    def lately(self, steps: int) -> list[list[list[int]]]:
        """Where the latest so many steps began to read, by source."""
        return [[list(asdict(cursor).values()) for cursor in cursors] for cursors in list(self._read)[-steps:]]

    def recall(self, lately: Sequence[list[list[int]]]) -> None:
        """The next step is the one after these (`lately`)."""
        self._read.extend([Cursor(*values) for values in cursors] for cursors in lately)

    def latest(self, steps: int, now: Sequence[Cursor]) -> list[LeaveOut]:
        """What the latest so many steps have read. `now`: where the next one begins."""
        if not self._read:
            return []
        begun = list(self._read)[-steps:][0]
        return [
            LeaveOut(source=name, begin=list(asdict(begin).values()), end=list(asdict(end).values()))
            for name, begin, end in zip(self._names, begun, now, strict=True)
            if begin != end
        ]
