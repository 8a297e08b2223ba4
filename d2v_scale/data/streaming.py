"""Shards without an index: read in order, each rank and worker its own ones. Outside the promise of exact resume.

A shard is indexed in memory when its turn comes, so damage is named and no partial sample is handed out here either.
What cannot be had without an index: planned batches, text packing that is the same at any world size, resume in O(1).
"""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch.utils.data import get_worker_info

from d2v_scale import modalities
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data2vec.stateless import key, numpy_generator
from d2v_scale.errors import ConfigError, DataStarved
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import TextStem
from d2v_scale.redaction import same_address
from d2v_scale.shards.fetching import ShardCache
from d2v_scale.shards.order import KeyedPermutation
from d2v_scale.shards.plan import Cursor, PlannedBatch
from d2v_scale.shards.reading import Fault, NothingHere, RawSample, SampleFault, read_sample
from d2v_scale.shards.shard_index import index_tar
from d2v_scale.shards.shard_set import ShardSet, is_remote

log = logging.getLogger(__name__)


@dataclass
class StreamPlan:
    """Counts rows: which samples they are depends on who reads them."""

    number: int
    batch_size: int

    def next_batch(self, cursor: Cursor) -> tuple[PlannedBatch, Cursor]:
        """The next `batch_size` rows, numbered through the whole run."""
        rows = np.arange(cursor.offset, cursor.offset + self.batch_size)
        nothing = np.zeros(self.batch_size, dtype=np.int64)
        return PlannedBatch(self.number, nothing, nothing, rows), replace(cursor, offset=int(rows[-1]) + 1)


class StreamedSource:
    """A source whose shards have no index."""

    def __init__(
        self,
        shards: ShardSet,
        source: SourceConfig,
        name: str,
        data: DataConfig,
        model: ModelConfig,
        seed: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self.shards = shards
        self.name = name
        self.modality = source.modality
        self.tokenizer = Path(data.text.tokenizer) if data.text.tokenizer else None
        self.fingerprint = key(*(same_address(path) for path in shards.paths)) >> 2
        self._data = data
        self._model = model
        self._seed = seed
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._opened = time.time()
        self._batch_size = 1
        self.stem = modalities.of(model, source.modality)
        if self.stem.uses_tokenizer and self.tokenizer is None:
            raise ConfigError("data.text.tokenizer", "is not set, and the shards have no index that names one")
        log.warning(
            "%s has no index: its shards are streamed, each rank its own. A resumed run reads past what was used, "
            "approximately, and the order depends on the number of ranks and workers. `d2v index` makes one.",
            source.shards,
        )

    @property
    def items_per_epoch(self) -> int:
        """Not known."""
        return 0

    def batches_per_epoch(self, batch_size: int, unit: str) -> float:
        """Raises ConfigError: not known."""
        del batch_size, unit
        raise ConfigError(
            "data.sources.repeat", f"needs indexed shards; those of {self.name} have no index", "Index them."
        )

    @property
    def epoch_is_counted(self) -> bool:
        """A stream does not know where an epoch ends."""
        return False

    def plan(self, batch_size: int, unit: str) -> StreamPlan:
        """Batches of `batch_size` rows. Raises ConfigError for units that need an index."""
        if unit == "seconds":
            raise ConfigError("batch_unit", "'seconds' needs indexed shards", "Index them with `d2v index`.")
        if unit == "tokens":
            stem = self._model.of(self.modality).sole(TextStem)
            batch_size = max(1, batch_size // stem.max_positions)
        self._batch_size = batch_size
        return StreamPlan(self._data.source_names().index(self.name), batch_size)

    def open_store(self) -> "StreamStore":
        """This worker's stream."""
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        return StreamStore(
            self.shards.paths,
            ShardCache.of(self._data),
            key(self._seed, self.name),
            self._dp_rank * workers + number,
            self._dp_size * workers,
            self._opened,
            self._batch_size,
        )


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
