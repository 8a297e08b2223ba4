"""Shards without an index: read in order, each rank and worker its own ones. Outside the promise of exact resume.

What cannot be had without an index: planned batches, text packing that is the same at any world size, resume in O(1).
`shards/stream.py` reads them.
"""

import logging
import time
from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import get_worker_info

from d2v_scale import modalities
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data2vec.stateless import key
from d2v_scale.errors import ConfigError
from d2v_scale.modalities.text.tokenizer import wanted_tokenizer
from d2v_scale.model.config import ModelConfig
from d2v_scale.redaction import same_address
from d2v_scale.shards.fetching import ShardCache
from d2v_scale.shards.plan import Cursor, PlannedBatch
from d2v_scale.shards.shard_set import ShardSet
from d2v_scale.shards.stream import StreamStore

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
        self.tokenizer = wanted_tokenizer(data.text.tokenizer, None)
        self.fingerprint = key(*(same_address(path) for path in shards.paths)) >> 2
        self._data = data
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
            longest, _ = self.stem.extent(self._data)
            batch_size = max(1, batch_size // longest)
        self._batch_size = batch_size
        return StreamPlan(self._data.source_names().index(self.name), batch_size)

    def open_store(self) -> StreamStore:
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
