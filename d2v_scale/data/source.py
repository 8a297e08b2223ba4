"""One data source: its shards, what counts as an item of it, and how items become planned batches."""

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data.config import SAMPLE_RATE, DataConfig, SourceConfig
from d2v_scale.data.fetching import ShardCache
from d2v_scale.data.order import WindowOrder
from d2v_scale.data.plan import SourcePlan
from d2v_scale.data.reading import SampleStore
from d2v_scale.data.shard_set import ShardSet, check_before_start, find_shards
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.data2vec.stateless import key
from d2v_scale.errors import DataError, DataStarved
from d2v_scale.files import file_sha256
from d2v_scale.model.config import Modality, ModelConfig

log = logging.getLogger(__name__)


def open_store(shards: ShardSet, data: DataConfig) -> SampleStore:
    """A reader of the samples of `shards`, for one process."""
    return SampleStore(shards, ShardCache.of(data), data.shards_kept)


def open_source(
    data: DataConfig, number: int, model: ModelConfig, seed: int, dp_rank: int, dp_size: int
) -> "Source | StreamedSource":
    """Find and check the shards of source `number`. Raises DataError; logs what is survived."""
    source = data.sources[number]
    shards = find_shards(source)
    name = data.source_names()[number]
    if not shards.indexed:
        return StreamedSource(shards, source, name, data, model, seed, dp_rank, dp_size)
    for warning in check_before_start(shards, source, data.max_bad_ratio):
        log.warning("%s", warning)
    return Source(shards, source, name, data, model, seed)


class Source:
    """Shards with an index, planned for one model."""

    def __init__(
        self, shards: ShardSet, source: SourceConfig, name: str, data: DataConfig, model: ModelConfig, seed: int
    ) -> None:
        self.shards = shards
        self.name = name
        self.modality: Modality = source.modality
        self.tokenizer: Path | None = None
        self.fingerprint = shards.fingerprint()
        self._data = data
        self._seed = seed
        self._lengths = lru_cache(maxsize=data.shards_kept)(self._read_lengths)
        if source.modality == "text":
            assert model.text is not None
            self.tokenizer = Path(data.text.tokenizer) if data.text.tokenizer else shards.tokenizer
            self._block = model.text.max_positions
            self._check_tokenizer(source)

    def _check_tokenizer(self, source: SourceConfig) -> None:
        """Raises DataError unless the index counts the tokens of the tokenizer that is used."""
        index = self.shards.index
        assert index is not None
        self.shards.require_tokenizer(source.shards, self.tokenizer)
        if self.tokenizer is not None and not self.tokenizer.is_file():
            raise DataError(f"The tokenizer {self.tokenizer} does not exist.", "Correct data.text.tokenizer.")
        if self.tokenizer is not None and index.tokenizer_sha256 != file_sha256(self.tokenizer):
            raise DataError(
                f"The token counts in {self.shards.index_file} are of another tokenizer than {self.tokenizer}.",
                "Index the shards again with tools/index_shards.py --tokenizer.",
            )

    @property
    def items_per_epoch(self) -> int:
        """Rows of an epoch (of text packed by document: at least as many)."""
        if self.modality == "text" and self._data.text.packing == "continuous":
            return int((-(-self.shards.length_s // (self._block - 1))).sum())
        return int(self.shards.samples_s.sum())

    def batches_per_epoch(self, batch_size: int, unit: str) -> float:
        """About how many batches of `batch_size` samples, seconds or tokens an epoch has."""
        if unit == "samples":
            return self.items_per_epoch / batch_size
        length = float(self.shards.length_s.sum())
        return length / (batch_size * (SAMPLE_RATE if unit == "seconds" else 1))

    @property
    def epoch_is_counted(self) -> bool:
        """Whether `items_per_epoch` is exact."""
        return self.modality != "text" or self._data.text.packing == "continuous"

    def open_store(self) -> SampleStore:
        """A reader of the samples, for one process."""
        return open_store(self.shards, self._data)

    def plan(self, batch_size: int, unit: str) -> SourcePlan:
        """Batches of `batch_size` samples, seconds or tokens."""
        self.fingerprint = key(self.fingerprint, self._seed, batch_size, unit, *self._plan_options()) >> 2
        order = WindowOrder(len(self.shards.paths), self._items, self._data.window_shards, self._seed, self.name)
        arguments: dict[str, Any] = {}
        size: float = batch_size
        if self.modality == "speech":
            arguments = {
                "length_of": self._speech_lengths,
                "crop_to_shortest": True,
                "cost_is_length": unit == "seconds",
            }
            size = batch_size * SAMPLE_RATE if unit == "seconds" else batch_size
        elif self.modality == "text" and self._data.text.packing == "document":
            arguments = {"length_of": self._chunk_lengths, "cost_is_length": unit == "tokens"}
        elif self.modality == "text" and unit == "tokens":
            size = max(1, batch_size // self._block)
        number = self._data.source_names().index(self.name)
        return SourcePlan(order, number, size, **arguments)

    def _plan_options(self) -> list[int | str]:
        options: list[int | str] = [self._data.window_shards]
        if self.modality == "speech":
            options += [int(self._data.speech.min_seconds * 1000), int(self._data.speech.max_seconds * 1000)]
        if self.modality == "text":
            options += [self._block, self._data.text.packing]
        return options

    def _read_lengths(self, shard: int) -> NDArray[np.int64]:
        """Lengths of a shard's samples, which batches are planned from.

        Raises DataStarved: without them ranks would no longer agree on the plan, so one shard cannot be passed over.
        """
        try:
            return self.shards.members(shard).length_n
        except DataError as error:
            raise DataStarved(f"Batches of {self.name!r} cannot be planned. {error}") from error

    def _items(self, shard: int) -> int:
        """Items of a shard: samples; for text blocks or chunks of documents."""
        if self.modality != "text":
            return self.shards.entries[shard].samples
        if self._data.text.packing == "document":
            return len(self._chunk_lengths(shard))
        return -(-self.shards.entries[shard].length // (self._block - 1))

    def _speech_lengths(self, shard: int) -> NDArray[np.int64]:
        """Samples at 16 kHz that an item contributes at most; 0: too short; -1: it could not be read."""
        speech = self._data.speech
        length_n = np.asarray(self._lengths(shard))
        shortest, longest = (round(seconds * SAMPLE_RATE) for seconds in (speech.min_seconds, speech.max_seconds))
        return np.where(length_n < 0, -1, np.where(length_n < shortest, 0, length_n.clip(max=longest)))

    def _chunk_lengths(self, shard: int) -> NDArray[np.int64]:
        """Tokens of each chunk of each document, <s> included."""
        from d2v_scale.data.text import chunks_of_documents

        _, start_n, stop_n = chunks_of_documents(np.asarray(self._lengths(shard)), self._block - 1)
        return stop_n - start_n + 1
