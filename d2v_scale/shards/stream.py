"""Samples of shards without an index, in an order of this reader's own.

A shard is indexed in memory when its turn comes, so damage is named and no partial sample is handed out here either.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from d2v_scale.data2vec.stateless import numpy_generator
from d2v_scale.errors import DataStarved
from d2v_scale.shards.fetching import ShardCache
from d2v_scale.shards.order import KeyedPermutation
from d2v_scale.shards.patterns import is_remote
from d2v_scale.shards.reading import Fault, NothingHere, RawSample, SampleFault, read_sample
from d2v_scale.shards.shard_index import index_tar

log = logging.getLogger(__name__)


class StreamStore:
    """One of `streams` readers: its `read` hands out the next sample, whichever is asked for.

    A reader whose share of the shards holds nothing leaves its rows blank. The set is starved when none of its shards
    holds anything; where they do and yet nothing of it can be used by any reader, `RunTotals` finds out.
    """

    def __init__(
        self,
        paths: list[str],
        cache: ShardCache,
        seed: int,
        stream: int,
        streams: int,
        opened: float = 0.0,
        batch_size: int = 1,
    ) -> None:
        """`opened`: when the run opened its sources (Unix seconds). Without an index nothing tells whether an older
        copy is still what lies at the URL. `batch_size`: rows of a step, of all streams."""
        self._paths = paths
        self._cache = cache
        self._seed = seed
        self._stream = stream
        self._streams = streams
        self._opened = opened
        self._batch_size = batch_size
        self._samples: Iterator[RawSample | None] | None = None
        self._samples_elsewhere = 0
        self._last: RawSample | None = None
        self._counts: dict[int, int] = {}
        self._damage: list[Fault] = []
        self._passed_over = 0
        self._why = ""

    def read(self, shard: int, number: int) -> RawSample:
        """The next sample. The first call, by its row's `number`, decides how much is passed over. Raises NothingHere
        where this stream has none, and DataStarved where the whole set has none."""
        if self._samples is None:
            before = number // self._batch_size * self._batch_size  # rows of the steps before this one
            self._samples = self._read_from(before // self._streams)
        sample = next(self._samples)
        if sample is None:
            raise NothingHere
        self._last = sample
        return sample

    def describe(self, shard: int, number: int, reason: str) -> Fault:
        """A fault of the sample that was read last."""
        assert self._last is not None
        return self._last.fault(reason).fault

    def pass_over(self, why: str) -> None:
        """The sample that was read last makes no row, and is no fault. After an epoch of nothing else rows stay blank;
        where there is no other stream, `read` raises DataStarved, which says `why`."""
        self._passed_over += 1
        self._why = why

    def take_damage(self) -> list[Fault]:
        """What was found wrong with shards since the last call."""
        damage, self._damage = self._damage, []
        return damage

    def _read_from(self, passed: int) -> Iterator[RawSample | None]:
        """Samples without end; None for a row that stays blank."""
        if passed:
            log.info("reading past %d samples of this stream", passed)
        epoch = 0
        while True:
            delivered, self._passed_over = 0, 0
            for shard in self._shards(epoch):
                if passed and self._counts.get(shard, passed + 1) <= passed:
                    passed -= self._counts[shard]
                    delivered += self._counts[shard]
                    continue
                for sample in self._samples_of(shard, epoch):
                    delivered += 1
                    if passed:
                        passed -= 1
                    else:
                        yield sample
            if self._passed_over == delivered:
                blank = self._blank_rows(epoch, delivered)
                yield from [None] * max(0, blank - passed)
                passed = max(0, passed - blank)
            elif self._passed_over:
                log.warning(
                    "epoch %d of a stream: %d of %d samples left out: %s",
                    epoch,
                    self._passed_over,
                    delivered,
                    self._why,
                )
            epoch += 1

    def _blank_rows(self, epoch: int, passed_over: int) -> int:
        """How many rows stay blank before the next epoch, since this stream has nothing to give: about as many as
        others have in one. Raises DataStarved where the whole set has nothing."""
        if passed_over and self._streams == 1:
            raise DataStarved(f"No sample of an epoch of the stream can be used: {self._why}.")
        if epoch == 0:
            why = self._why if passed_over else "none can be read"
            log.warning("Stream %d of %d has no sample: its rows stay blank (%s)", self._stream, self._streams, why)
        if not passed_over and not self._samples_elsewhere:
            damage = list(self._damage)
            found = (next(self._samples_of(shard, epoch, of_all=True), None) for shard in range(len(self._paths)))
            if not any(found):
                faults = "; ".join(str(fault) for fault in self._damage[-3:])
                raise DataStarved(f"No sample could be read in an epoch of the stream. {faults}")
            self._damage = damage  # what others find they tell themselves
        return passed_over or self._samples_elsewhere

    def _shards(self, epoch: int) -> Iterator[int]:
        """This stream's shards, or all of them where there are fewer shards than streams."""
        count = len(self._paths)
        permuted = KeyedPermutation(count, "shards", self._seed, epoch)
        first, step = (self._stream, self._streams) if count >= self._streams else (0, 1)
        return (permuted(position) for position in range(first, count, step))

    def _samples_of(self, shard: int, epoch: int, of_all: bool = False) -> Iterator[RawSample]:
        """This stream's samples of a shard, or with `of_all` every stream's."""
        name = self._paths[shard]
        try:
            path = Path(self._cache.fetch(name, newer_than=self._opened) if is_remote(name) else name)
            members, damage, _ = index_tar(path)
            with path.open("rb") as stream:
                self._damage += [Fault(name, "", reason) for reason in damage]

                def read_at(start: int, size: int) -> bytes:
                    stream.seek(start)
                    return stream.read(size)

                order = numpy_generator("stream", self._seed, epoch, shard).permutation(len(members))
                whole = [int(k) for k in order if members.length_n[k] >= 0]
                if of_all:
                    self._samples_elsewhere = -(-len(whole) * len(self._paths) // self._streams)
                elif len(self._paths) < self._streams:
                    whole = whole[self._stream :: self._streams]
                self._counts[shard] = len(whole)
                for number in whole:
                    try:
                        sample = read_sample(name, read_at, members, number)
                    except SampleFault as error:
                        # The shard changed or its disk failed after it was indexed: each sample counts by itself.
                        self._damage.append(error.fault)
                        self._counts[shard] -= 1
                        continue
                    yield sample
        except Exception as error:  # one shard, whatever is in it, must not end the stream
            self._damage.append(Fault(name, "", f"cannot be read: {error}"))
