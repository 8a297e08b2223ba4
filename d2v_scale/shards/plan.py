"""Which items make up the batch of a step: planned for all ranks together, window by window, from the index alone.

A source's position is three integers (`Cursor`), so a run resumes anywhere by planning one window again.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data2vec.stateless import key, numpy_generator
from d2v_scale.errors import DataError
from d2v_scale.shards.order import WindowOrder

Ints = NDArray[np.int64]

_LENGTH_BUCKET = 1.05
_WINDOWS_KEPT = 3


@dataclass(frozen=True, order=True)
class Cursor:
    """Where a source continues."""

    epoch: int = 0
    window: int = 0
    offset: int = 0
    """Items (batches, where they are bucketed by length) of the window that were used."""


@dataclass
class PlannedBatch:
    """One step's items over all ranks, (n,) each."""

    source: int
    epoch_n: Ints
    shard_n: Ints
    item_n: Ints
    length: int = 0
    """Common length of the rows where they are bucketed by it; 0 elsewhere."""
    left_out: dict[int, int] = field(default_factory=dict)
    """Items by epoch that were passed over on the way to this batch, because their length is 0."""
    cropped: int = 0
    """What the rows of all ranks lose together, because each takes the length of the shortest."""
    length_n: Ints | None = None
    """What the index says that each item's length is, where rows are cropped to the shortest; 0: not read."""
    elsewhere: int = 0
    """The smallest length among the rows of the other shares; 0: there is none."""
    longest_p: tuple[int, ...] = ()
    """Of paired samples, what is read of each part's longest among the rows of all ranks, as an index counts it: rows
    are padded to it, so that they are as long however the batch is shared out."""
    unread: int = 0
    """Items among them whose length the index could not read: lost, each a hole in the batch."""

    def __len__(self) -> int:
        return len(self.item_n)

    def rows_by_epoch(self) -> dict[int, int]:
        """How many of the items are of which epoch."""
        epochs, counts = np.unique(self.epoch_n, return_counts=True)
        return dict(zip(epochs.tolist(), counts.tolist(), strict=True))

    def share(self, part: int, parts: int) -> "PlannedBatch":
        """The `part`th of `parts` contiguous shares, equal but for one item."""
        rows = slice(len(self) * part // parts, len(self) * (part + 1) // parts)
        share = replace(self, epoch_n=self.epoch_n[rows], shard_n=self.shard_n[rows], item_n=self.item_n[rows])
        if self.length_n is not None:
            others = np.delete(self.length_n, rows)
            share.length_n = self.length_n[rows]
            share.elsewhere = int(others[others > 0].min()) if (others > 0).any() else 0
        return share

    def length_of_read(self, kept: list[int]) -> int:
        """The common length if the rows `kept` are the only ones of this share that could be read: `length`, unless it
        was that of one which could not."""
        if self.length_n is None or not kept:
            return self.length
        shortest = int(self.length_n[kept].min())
        return min(shortest, self.elsewhere) if self.elsewhere else shortest

    @property
    def measured_length(self) -> int:
        """What the rows of all ranks hold together, as the index knows it. 0 where they are not bucketed by length."""
        return self.length * (len(self) - self.unread)

    @property
    def sample_ids(self) -> Ints:
        """A name for each item: source, shard and number in one int64."""
        return (self.source << 56) | (self.shard_n << 32) | self.item_n


class SourcePlan:
    """Batches of one source, one after the other, epoch after epoch.

    Without `length_of`, every batch holds exactly `batch_size` items and runs on into the next window and epoch. With
    it, the items of a window are sorted by length and cut into batches of equal cost, at most `batch_size` each, which
    are then shuffled.
    """

    def __init__(
        self,
        order: WindowOrder,
        number: int,
        batch_size: float,
        *,
        length_of: Callable[[int], Ints] | None = None,
        parts_of: Callable[[int], Ints] | None = None,
        cost_is_length: bool = False,
        crop_to_shortest: bool = False,
    ) -> None:
        """`length_of(shard)`: the length of each of its items, 0 for those to leave out, -1 for those that could not be
        read: they are planned, so that they are counted, and change neither length nor batch of the others.
        `parts_of(shard)`: (N, P), what is read of each part of its items; 0 where there is none.
        `batch_size`: items, or with `cost_is_length` the sum of their lengths. `crop_to_shortest`: rows take their
        batch's smallest length, else its largest."""
        self._order = order
        self._number = number
        self._batch_size = batch_size
        self._length_of = length_of
        self._parts_of = parts_of
        self._cost_is_length = cost_is_length
        self._crop_to_shortest = crop_to_shortest
        self._windows: OrderedDict[tuple[int, int], list[PlannedBatch]] = OrderedDict()
        self._left_out: dict[tuple[int, int], int] = {}

    def next_batch(self, cursor: Cursor) -> tuple[PlannedBatch, Cursor]:
        """The batch at `cursor`, and the cursor after it."""
        if self._length_of is None:
            return self._next_items(cursor)
        left_out: dict[int, int] = {}
        for tried in self._onwards(cursor):
            batches = self._window(tried.epoch, tried.window)
            if tried.offset == 0 and (passed := self._left_out[tried.epoch, tried.window]):
                left_out[tried.epoch] = left_out.get(tried.epoch, 0) + passed
            if tried.offset < len(batches):
                found = replace(batches[tried.offset], left_out=left_out)
                return found, replace(tried, offset=tried.offset + 1)
        raise AssertionError("unreachable")

    def cropped_share(self, cursor: Cursor) -> float:
        """Which share of the lengths in the window at `cursor` is lost by cropping rows to the shortest of a batch."""
        batches = self._window(cursor.epoch, cursor.window)
        cropped = sum(batch.cropped for batch in batches)
        return cropped / max(1, cropped + sum(batch.measured_length for batch in batches))

    def shards(self, cursor: Cursor) -> list[int]:
        """Those of the window at `cursor`."""
        return self._order.shards(cursor.epoch, cursor.window)

    def _onwards(self, cursor: Cursor) -> Iterator[Cursor]:
        """This cursor, then the beginnings of the windows after it.

        The one window that has items may be the first of an epoch and the last of the next: two epochs are enough.
        """
        yield cursor
        for _ in range(2 * self._order.windows):
            cursor = Cursor(cursor.epoch, cursor.window + 1)
            if cursor.window >= self._order.windows:
                cursor = Cursor(cursor.epoch + 1)
            yield cursor
        raise DataError(
            f"No sample of {self._order.source!r} is usable.",
            "Compare data.speech.min_seconds with the lengths that `d2v inspect` shows.",
        )

    def _next_items(self, cursor: Cursor) -> tuple[PlannedBatch, Cursor]:
        wanted = int(self._batch_size)
        parts: list[PlannedBatch] = []
        while wanted > 0:
            for tried in self._onwards(cursor):
                [window] = self._window(tried.epoch, tried.window)
                if tried.offset < len(window):
                    break
            taken = slice(tried.offset, tried.offset + wanted)
            part = replace(
                window, epoch_n=window.epoch_n[taken], shard_n=window.shard_n[taken], item_n=window.item_n[taken]
            )
            parts.append(part)
            wanted -= len(part)
            cursor = replace(tried, offset=tried.offset + len(part))
        if len(parts) == 1:
            return parts[0], cursor
        joined = PlannedBatch(
            self._number,
            np.concatenate([part.epoch_n for part in parts]),
            np.concatenate([part.shard_n for part in parts]),
            np.concatenate([part.item_n for part in parts]),
        )
        return joined, cursor

    def _window(self, epoch: int, window: int) -> list[PlannedBatch]:
        """The batches of a window; a single one of all its items where they are not bucketed."""
        if (epoch, window) not in self._windows:
            shard_n, item_n = self._order.items(epoch, window)
            whole = PlannedBatch(self._number, np.full(len(item_n), epoch), shard_n, item_n)
            batches = [whole] if self._length_of is None else self._bucket(whole, epoch, window)
            self._windows[epoch, window] = batches
            self._left_out[epoch, window] = len(whole) - sum(map(len, batches))
            if len(self._windows) > _WINDOWS_KEPT:
                oldest, _ = self._windows.popitem(last=False)
                del self._left_out[oldest]
        return self._windows[epoch, window]

    def _bucket(self, whole: PlannedBatch, epoch: int, window: int) -> list[PlannedBatch]:
        assert self._length_of is not None
        length_n = np.zeros(len(whole), dtype=np.int64)
        for shard in np.unique(whole.shard_n):
            rows = whole.shard_n == shard
            length_n[rows] = self._length_of(int(shard))[whole.item_n[rows]]
        usable, unread = np.flatnonzero(length_n > 0), np.flatnonzero(length_n < 0)
        parts = self._cut(usable, length_n[usable])
        if len(parts) == 0:
            return [self._batch(whole, unread, length_n)] if len(unread) else []
        holes = np.array_split(unread, len(parts))
        batches = [self._batch(whole, _evenly(rows, among), length_n) for rows, among in zip(parts, holes, strict=True)]
        if self._parts_of is not None:
            for batch in batches:
                batch.longest_p = self._longest_parts(batch)
        shuffled = numpy_generator("batches", self._order.seed, self._order.source, epoch, window)
        return [batches[k] for k in shuffled.permutation(len(batches))]

    def _longest_parts(self, batch: PlannedBatch) -> tuple[int, ...]:
        assert self._parts_of is not None
        each = [
            self._parts_of(int(shard))[batch.item_n[batch.shard_n == shard]].max(axis=0)
            for shard in np.unique(batch.shard_n)
        ]
        return tuple(np.max(each, axis=0).tolist())

    def _cut(self, usable: Ints, length_u: Ints) -> list[Ints]:
        """Rows `usable`, which are `length_u` long, as lists of nearly one length and of equal cost."""
        if len(usable) == 0:
            return []
        # A stable sort by coarse length keeps the shuffled order among items of nearly the same length.
        order = np.argsort(np.floor(np.log(length_u) / np.log(_LENGTH_BUCKET)), kind="stable")
        cost_n = np.cumsum(length_u[order] if self._cost_is_length else np.ones(len(order)))
        count = max(1, int(np.ceil(cost_n[-1] / self._batch_size)))
        ends = np.searchsorted(cost_n, cost_n[-1] / count * np.arange(1, count) + 1e-6)
        return [rows for rows in np.split(usable[order], ends) if len(rows)]

    def _batch(self, whole: PlannedBatch, rows: Ints, length_n: Ints) -> PlannedBatch:
        """The batch of `rows`, whose length is that of the items among them that have one."""
        batch = PlannedBatch(self._number, whole.epoch_n[rows], whole.shard_n[rows], whole.item_n[rows])
        known = length_n[rows][length_n[rows] > 0]
        batch.unread = len(rows) - len(known)
        if len(known):
            batch.length = int(known.min() if self._crop_to_shortest else known.max())
            batch.cropped = int((known - batch.length).clip(min=0).sum())
        if self._crop_to_shortest:
            batch.length_n = length_n[rows].clip(min=0)
        return batch


def _evenly(rows: Ints, holes: Ints) -> Ints:
    """`rows` in their order with `holes` spread among them, so that contiguous shares have equal parts of both."""
    places = (np.arange(len(holes)) + 0.5) * len(rows) / max(1, len(holes))
    return np.insert(rows, places.astype(int), holes)


class Mixture:
    """Which source a step reads: a pure function of (seed, step), so that all ranks agree without asking."""

    def __init__(self, weights: list[float], temperature: float, seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64) ** (1.0 / temperature)
        self.shares = shares / shares.sum()
        self._limits = np.cumsum(self.shares)
        self._seed = seed

    def source_of(self, step: int) -> int:
        """The number of the source that `step` reads."""
        uniform = (key("source", self._seed, step) >> 11) * 2.0**-53
        return min(int(np.searchsorted(self._limits, uniform, side="right")), len(self.shares) - 1)
