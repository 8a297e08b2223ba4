"""Labelled samples for training: whole recordings, texts or pairs, and augmented images, with the planner's guarantees.

What a step holds is a pure function of the configuration, the seed and the position, as in pretraining.
"""

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale.data.collate import Decoder, Row, Stacked, make_decoder
from d2v_scale.data.config import DataConfig
from d2v_scale.data.labels import ClassLabels, Labels, Scores, Transcripts, Vocabulary
from d2v_scale.data.loader import StepLoader
from d2v_scale.data.order import WindowOrder
from d2v_scale.data.plan import SourcePlan
from d2v_scale.data.reading import RawSample, Store
from d2v_scale.data.shard_set import check_before_start, find_shards
from d2v_scale.data.source import SAMPLE_RATE, Source
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.data.vision import VisionDecoder
from d2v_scale.data2vec.stateless import key
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.finetuning.augmentation import RandAugment
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.model.config import ModelConfig

log = logging.getLogger(__name__)


def labels_of(task: TaskConfig) -> Labels:
    """How the labels of a task are read."""
    if task.kind == "ctc":
        return Transcripts(Vocabulary(task.ctc.letters))
    return ClassLabels() if task.kind == "classify" else Scores()


class LabelledSource(Source):
    """Shards whose items are whole samples, for every modality."""

    def __init__(self, data: DataConfig, number: int, model: ModelConfig, seed: int, *, keep_long: bool) -> None:
        """Finds and checks the shards. `keep_long`: recordings above `data.speech.max_seconds` are cut, not left out.

        Raises DataError.
        """
        source = data.sources[number]
        shards = find_shards(source)
        if not shards.indexed:
            raise DataError(f"The shards of {source.shards!r} have no index.", "Make one with tools/index_shards.py.")
        for warning in check_before_start(shards, source, data.max_bad_ratio):
            log.warning("%s", warning)
        super().__init__(shards, source, data.source_names()[number], data, model, seed)
        self._keep_long = keep_long

    @property
    def items_per_epoch(self) -> int:
        """Samples."""
        return int(self.shards.samples_s.sum())

    def plan(self, batch_size: int, unit: str) -> SourcePlan:
        """Batches of `batch_size` samples, or seconds; recordings of a batch are of nearly the same length."""
        if unit == "tokens":
            raise ConfigError("batch_unit", "is 'tokens'", "Fine-tuning counts samples, or seconds of speech.")
        options = [self._data.window_shards, *self._plan_options(), int(self._keep_long)]
        self.fingerprint = key(self.fingerprint, self._seed, batch_size, unit, "labelled", *options) >> 2
        order = WindowOrder(len(self.shards.paths), self._items, self._data.window_shards, self._seed, self.name)
        number = self._data.source_names().index(self.name)
        if self.modality != "speech":
            return SourcePlan(order, number, batch_size)
        seconds = unit == "seconds"
        size = batch_size * SAMPLE_RATE if seconds else batch_size
        return SourcePlan(order, number, size, length_of=self._usable_lengths, cost_is_length=seconds)

    def _items(self, shard: int) -> int:
        return self.shards.entries[shard].samples

    def _usable_lengths(self, shard: int) -> NDArray[np.int64]:
        """Samples at 16 kHz; 0 where the recording is too short, or too long for its transcript to be cut."""
        length_n = self._speech_lengths(shard)
        if self._keep_long:
            return length_n
        longest = round(self._data.speech.max_seconds * SAMPLE_RATE)
        return np.where(np.asarray(self._lengths(shard)) > longest, 0, length_n)


class LabelledDecoder:
    """A modality's decoder that also reads labels and augments labelled images."""

    def __init__(self, decoder: Decoder, labels: Labels, augment: RandAugment | None) -> None:
        self.extensions = decoder.extensions
        self.draws = decoder.draws + (augment.draws if augment is not None else 0)
        self._decoder = decoder
        self._labels = labels
        self._augment = augment

    def training_row(self, store: Store, shard: int, item: int, length: int, draws: NDArray[np.float64]) -> Row:
        """The whole sample, an image augmented, and its label."""
        del length
        sample = store.read(shard, item)
        label = self._labels.read(sample)
        if not isinstance(self._decoder, VisionDecoder):
            return Row(sample.key, self._decoder.evaluation_row(sample), label)
        image = self._decoder.view(sample, draws)
        if self._augment is not None:
            image = self._augment(image, draws[self._decoder.draws :])
        return Row(sample.key, np.asarray(image), label)

    def evaluation_row(self, sample: RawSample) -> NDArray[Any]:
        """The sample without randomness."""
        return self._decoder.evaluation_row(sample)

    def stack(self, rows: list[NDArray[Any]]) -> Stacked:
        """Rows to a batch."""
        return self._decoder.stack(rows)

    def blank(self) -> NDArray[Any]:
        """A row of a batch that has none."""
        return self._decoder.blank()


class LabelledLoader(StepLoader):
    """A `StepLoader` of labelled samples."""

    def __init__(self, task: TaskConfig, data: DataConfig, model: ModelConfig, **options: Any) -> None:
        """`options` as for `StepLoader`, from `seed` on. Raises ConfigError and DataError before any training step."""
        self._task = task
        self.labels = labels_of(task)
        super().__init__(data, model, task.masking(), **options)

    @property
    def classes(self) -> list[str]:
        """Names of the labels, of the first source; empty: its index names none."""
        index = self.sources[0].shards.index
        return [] if index is None else index.classes

    def _open_sources(self, model: ModelConfig, seed: int, dp_rank: int, dp_size: int) -> list[LabelledSource]:
        del dp_rank, dp_size
        keep_long = self._task.kind != "ctc"
        numbers = range(len(self._data.sources))
        return [LabelledSource(self._data, number, model, seed, keep_long=keep_long) for number in numbers]

    def _make_decoder(self, source: Source | StreamedSource, model: ModelConfig) -> Decoder:
        image = self._task.image
        augment = RandAugment(image.rand_augment, image.rand_augment_std) if image.rand_augment > 0 else None
        decoder = make_decoder(source.modality, self._data, model, source.tokenizer)
        assert self.labels is not None
        return LabelledDecoder(decoder, self.labels, augment)
