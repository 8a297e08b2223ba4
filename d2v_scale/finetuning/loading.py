"""Labelled samples for training: whole recordings, texts or pairs, and augmented images, with the planner's guarantees.

What a step holds is a pure function of the configuration, the seed and the position, as in pretraining.
"""

import logging
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale import modalities
from d2v_scale.data.config import SAMPLE_RATE, DataConfig
from d2v_scale.data.items import Recordings
from d2v_scale.data.labels import ClassLabels, Labels, Scores, SpokenTexts, Transcripts, Vocabulary
from d2v_scale.data.loader import StepLoader
from d2v_scale.data.source import Source
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.data2vec.stateless import key
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.finetuning.augmentation import RandAugment
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.model.config import ModelConfig
from d2v_scale.shards.class_names import agreed_classes
from d2v_scale.shards.one_content import reading
from d2v_scale.shards.order import WindowOrder
from d2v_scale.shards.plan import SourcePlan
from d2v_scale.shards.reading import RawSample, SampleFault, SampleStore, Store
from d2v_scale.shards.rows import Decoder, Row, Stacked, Viewer
from d2v_scale.shards.shard_index import Members
from d2v_scale.shards.shard_set import check_before_start, find_shards

log = logging.getLogger(__name__)

_ASKED_FOR_LABELS = 64
"""Shards that are searched for a label before the first step."""


def labels_of(task: TaskConfig) -> Labels:
    """How the labels of a task are read to learn them."""
    if task.kind == "ctc":
        return Transcripts(Vocabulary(task.ctc.letters))
    return ClassLabels(task.classes) if task.kind == "classify" else Scores()


def held_out_labels(task: TaskConfig) -> Labels:
    """How the labels are read that answers are compared with: of CTC the texts themselves."""
    return SpokenTexts(Vocabulary(task.ctc.letters)) if task.kind == "ctc" else labels_of(task)


def class_count(task: TaskConfig, classes: list[str]) -> int:
    """Outputs of a classifier of data whose index names `classes`. Raises ConfigError where the two do not fit."""
    if task.classes is None:
        if len(classes) < 2:
            raise ConfigError("task.classes", "is not set, and the shards' index names no classes", "Set it.")
        return len(classes)
    if task.classes < len(classes):
        raise ConfigError(
            "task.classes",
            f"is {task.classes}, but the shards' index names {len(classes)}, the last of them {classes[-1]!r}",
            f"Set it to {len(classes)}, or give shards of fewer classes.",
        )
    return task.classes


def labelled_numbers(members: Members, extension: str) -> NDArray[np.int64]:
    """Numbers of a shard's samples that have a label, which are the items of a plan."""
    if extension not in members.extensions:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(members.member_size_ne[:, members.extensions.index(extension)] > 0)


class LabelledSource(Source):
    """Shards whose items are whole samples with a label, for every modality."""

    def __init__(
        self, data: DataConfig, number: int, model: ModelConfig, seed: int, *, extension: str, keep_long: bool
    ) -> None:
        """Finds and checks the shards. `extension`: the member that holds a label. `keep_long`: recordings above
        `data.speech.max_seconds` are cut, not left out. Raises DataError.
        """
        source = data.sources[number]
        reads = modalities.of(model, source.modality).content
        shards = reading(find_shards(source), reads)
        if not shards.indexed:
            raise DataError(f"The shards of {source.shards!r} have no index.", "Make one with `d2v index`.")
        first = range(min(_ASKED_FOR_LABELS, len(shards.paths)))
        if not any(len(labelled_numbers(shards.members(shard), extension)) for shard in first):
            raise DataError(f"No sample of {source.shards!r} has a label (.{extension}).", "Give labelled shards.")
        for warning in check_before_start(shards, source, reads, data.max_bad_ratio):
            log.warning("%s", warning)
        super().__init__(shards, source, data.source_names()[number], data, model, seed)
        self._keep_long = keep_long
        self._extension = extension
        self._labelled = lru_cache(maxsize=data.shards_kept)(
            lambda shard: labelled_numbers(shards.members(shard), extension)
        )

    @property
    def items_per_epoch(self) -> int:
        """Samples; those without a label, too."""
        return int(self.shards.samples_s.sum())

    @property
    def epoch_is_counted(self) -> bool:
        """How many have a label is in the shards' own indexes, which are read one after the other."""
        return False

    def plan(self, batch_size: int, unit: str) -> SourcePlan:
        """Batches of `batch_size` samples, or seconds; recordings of a batch are of nearly the same length."""
        if unit == "tokens":
            raise ConfigError("batch_unit", "is 'tokens'", "Fine-tuning counts samples, or seconds of speech.")
        options = [self._data.window_shards, *self._plan_options(), self._extension, int(self._keep_long)]
        self.fingerprint = key(self.fingerprint, self._seed, batch_size, unit, "labelled", *options) >> 2
        order = WindowOrder(
            len(self.shards.paths),
            lambda shard: len(self._labelled(shard)),
            self._data.window_shards,
            self._seed,
            self.name,
        )
        number = self._data.source_names().index(self.name)
        if not isinstance(self.items, Recordings):
            return SourcePlan(order, number, batch_size)
        size, _ = self.items.plan(batch_size, unit)
        return SourcePlan(order, number, size, length_of=self._usable_lengths, cost_is_length=unit == "seconds")

    def _usable_lengths(self, shard: int) -> NDArray[np.int64]:
        """Samples at 16 kHz; 0 where the recording is too short, or too long for its transcript to be cut."""
        assert isinstance(self.items, Recordings)
        length_n = self.items.usable(shard)
        if not self._keep_long:
            longest = round(self._data.speech.max_seconds * SAMPLE_RATE)
            length_n = np.where(np.asarray(self._lengths(shard)) > longest, 0, length_n)
        return length_n[self._labelled(shard)]


class LabelledDecoder:
    """A modality's decoder that also reads labels and augments labelled images."""

    def __init__(self, decoder: Decoder, labels: Labels, augment: RandAugment | None, shards_kept: int) -> None:
        """`shards_kept`: of how many shards the places of labels stay in memory."""
        self.draws = decoder.draws + (augment.draws if augment is not None else 0)
        self._decoder = decoder
        self._labels = labels
        self._augment = augment
        self._shards_kept = shards_kept
        self._numbers: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def training_row(self, store: Store, shard: int, item: int, length: int, draws: NDArray[np.float64]) -> Row:
        """The whole sample, an image augmented, and its label."""
        del length
        assert isinstance(store, SampleStore)
        sample = store.read(shard, int(self._labelled(store, shard)[item]))
        try:
            return Row(sample.key, self._values(sample, draws), self._labels.read(sample))
        except SampleFault:
            raise
        except Exception as error:  # a decoder raises anything for damaged content
            raise sample.fault(f"cannot be decoded: {type(error).__name__}: {error}") from error

    def _labelled(self, store: SampleStore, shard: int) -> NDArray[np.int64]:
        if shard not in self._numbers:
            self._numbers[shard] = labelled_numbers(store.members(shard), self._labels.extension)
            if len(self._numbers) > self._shards_kept:
                self._numbers.popitem(last=False)
        return self._numbers[shard]

    def _values(self, sample: RawSample, draws: NDArray[np.float64]) -> NDArray[Any]:
        if not isinstance(self._decoder, Viewer):
            return self._decoder.evaluation_row(sample)
        image = self._decoder.view(sample, draws)
        if self._augment is not None:
            image = self._augment(image, draws[self._decoder.draws :])
        return np.asarray(image)

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
        self.classes: list[str] = []
        """Names of the labels; empty: no index has any."""
        super().__init__(data, model, task.masking(), **options)

    def _open_sources(self, model: ModelConfig, seed: int, dp_rank: int, dp_size: int) -> list[LabelledSource]:
        del dp_rank, dp_size
        assert self.labels is not None
        extension, keep_long = self.labels.extension, self._task.kind != "ctc"
        sources = [
            LabelledSource(self._data, number, model, seed, extension=extension, keep_long=keep_long)
            for number in range(len(self._data.sources))
        ]
        self.classes = agreed_classes([names for source in sources for names in source.shards.class_names])
        if self._task.kind == "classify":
            # Before any decoder has them: a label that the head has no output for is a fault of its sample.
            self.labels = ClassLabels(class_count(self._task, self.classes))
        return sources

    def _make_decoder(self, source: Source | StreamedSource, model: ModelConfig) -> Decoder:
        image = self._task.image
        augment = RandAugment(image.rand_augment, image.rand_augment_std) if image.rand_augment > 0 else None
        decoder = source.stem.build_decoder(self._data, source.tokenizer)
        assert self.labels is not None
        return LabelledDecoder(decoder, self.labels, augment, self._data.shards_kept)
