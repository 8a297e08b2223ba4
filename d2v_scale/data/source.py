"""One data source: its shards, what counts as an item of it, and how items become planned batches."""

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d2v_scale import modalities
from d2v_scale.data.config import SAMPLE_RATE, DataConfig, SourceConfig
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.data2vec.stateless import key
from d2v_scale.errors import DataError, DataStarved
from d2v_scale.modalities.text.tokenizer import tokenizer_sha256, wanted_tokenizer
from d2v_scale.model.config import ModelConfig
from d2v_scale.shards.fetching import ShardCache
from d2v_scale.shards.order import WindowOrder
from d2v_scale.shards.plan import SourcePlan
from d2v_scale.shards.reading import SampleStore
from d2v_scale.shards.shard_set import ShardSet, check_before_start, find_shards

log = logging.getLogger(__name__)


def open_store(shards: ShardSet, data: DataConfig) -> SampleStore:
    """A reader of the samples of `shards`, for one process."""
    return SampleStore(shards, ShardCache.of(data), data.shards_kept)


def open_source(
    data: DataConfig, number: int, model: ModelConfig, seed: int, dp_rank: int, dp_size: int
) -> "Source | StreamedSource":
    """Find and check the shards of source `number`. Raises DataError; logs what is survived."""
    source = data.sources[number]
    stem = modalities.of(model, source.modality)
    shards = stem.read(find_shards(source))
    name = data.source_names()[number]
    if not shards.indexed:
        return StreamedSource(shards, source, name, data, model, seed, dp_rank, dp_size)
    for warning in check_before_start(shards, source, stem.content, data.max_bad_ratio):
        log.warning("%s", warning)
    return Source(shards, source, name, data, model, seed)


def mixing_weights(
    data: DataConfig, opened: Sequence["Source | StreamedSource"], sizes: Sequence[tuple[int, str]]
) -> list[float]:
    """How much each source comes, before `data.temperature`. `sizes`: of the batches of each, and their unit."""
    return [
        source.weight * (1.0 if source.repeat is None else source.repeat * one.batches_per_epoch(*size))
        for source, one, size in zip(data.sources, opened, sizes, strict=True)
    ]


class Source:
    """Shards with an index, planned for one model."""

    def __init__(
        self, shards: ShardSet, source: SourceConfig, name: str, data: DataConfig, model: ModelConfig, seed: int
    ) -> None:
        self.shards = shards
        self.name = name
        self.modality = source.modality
        self.tokenizer: Path | None = None
        self.fingerprint = shards.fingerprint()
        self._data = data
        self._seed = seed
        self._lengths = lru_cache(maxsize=data.shards_kept)(self._read_lengths)
        self.stem = modalities.of(model, source.modality)
        self.items = self.stem.items(shards, data, self._lengths)
        if self.stem.uses_tokenizer:
            self.tokenizer = wanted_tokenizer(data.text.tokenizer, shards.tokenizer)
            self._check_tokenizer(source)

    def _check_tokenizer(self, source: SourceConfig) -> None:
        """Raises DataError unless the index counts the tokens of the tokenizer that is used."""
        index = self.shards.index
        assert index is not None
        self.shards.require_tokenizer(source.shards, self.tokenizer)
        if self.tokenizer is not None and not self.tokenizer.is_file():
            raise DataError(f"The tokenizer {self.tokenizer} does not exist.", "Correct data.text.tokenizer.")
        if self.tokenizer is not None and index.tokenizer_sha256 != tokenizer_sha256(self.tokenizer):
            raise DataError(
                f"The token counts in {self.shards.index_file} are of another tokenizer than {self.tokenizer}.",
                "Index the shards again with `d2v index` --tokenizer.",
            )

    @property
    def items_per_epoch(self) -> int:
        """Rows of an epoch (of text packed by document: at least as many)."""
        return self.items.per_epoch()

    def batches_per_epoch(self, batch_size: int, unit: str) -> float:
        """About how many batches of `batch_size` samples, seconds or tokens an epoch has."""
        if unit == "samples":
            return self.items_per_epoch / batch_size
        length = float(self.items.total_length())
        return length / (batch_size * (SAMPLE_RATE if unit == "seconds" else 1))

    @property
    def epoch_is_counted(self) -> bool:
        """Whether `items_per_epoch` is exact."""
        return self.items.counted

    def open_store(self) -> SampleStore:
        """A reader of the samples, for one process."""
        return open_store(self.shards, self._data)

    def plan(self, batch_size: int, unit: str) -> SourcePlan:
        """Batches of `batch_size` samples, seconds or tokens."""
        self.fingerprint = key(self.fingerprint, self._seed, batch_size, unit, *self._plan_options()) >> 2
        order = WindowOrder(
            len(self.shards.paths), self.items.of_shard, self._data.window_shards, self._seed, self.name
        )
        size, arguments = self.items.plan(batch_size, unit)
        return SourcePlan(order, self._data.source_names().index(self.name), size, **arguments)

    def _plan_options(self) -> list[int | str]:
        return [self._data.window_shards, *self.items.options()]

    def _read_lengths(self, shard: int) -> NDArray[np.int64]:
        """Lengths of a shard's samples, which batches are planned from.

        Raises DataStarved: without them ranks would no longer agree on the plan, so one shard cannot be passed over.
        """
        try:
            return self.shards.members(shard).length_n
        except DataError as error:
            raise DataStarved(f"Batches of {self.name!r} cannot be planned. {error}") from error
