"""Labelled samples in their stored order, without augmentation: for k-NN and probes."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.collate import Collator
from d2v_scale.data.config import SAMPLE_RATE, DataConfig, SourceConfig
from d2v_scale.data.labels import ClassLabels, Labels, Transcripts
from d2v_scale.data.paired import unmasked_pairs
from d2v_scale.data.source import open_store
from d2v_scale.data2vec.config import CompatConfig, MaskingConfig
from d2v_scale.errors import DataError
from d2v_scale.modalities.paired.decoder import PairedDecoder, Values
from d2v_scale.modalities.paired.modality import Paired
from d2v_scale.modalities.text.tokenizer import tokenizer_sha256, wanted_tokenizer
from d2v_scale.model.config import ModelConfig
from d2v_scale.shards.class_names import agreed_classes
from d2v_scale.shards.plan import PlannedBatch
from d2v_scale.shards.reading import Fault, SampleFault, SampleStore
from d2v_scale.shards.rows import Decoder, Row
from d2v_scale.shards.shard_index import Members
from d2v_scale.shards.shard_set import ShardSet, check_before_start, find_shards

log = logging.getLogger(__name__)

_NAMED = 3


class Read(NamedTuple):
    """What a labelled set made of the samples of a batch."""

    batch: Batch | None
    """None: none of them can be read."""
    labels: Any
    """As `Labels.stack` makes them of those that were read."""
    faults: list[Fault]
    """Of the others."""


def unmasked(
    stem: modalities.Modality,
    decoder: Decoder,
    rows: list[NDArray[Any]],
    sample_ids: Tensor,
    keys: tuple[str, ...],
    lost: int = 0,
) -> Batch:
    """A batch of decoded rows of which nothing is masked. `sample_ids`: int64 (B,); `lost`: see `Batch.lost`."""
    if isinstance(stem, Paired):
        assert isinstance(decoder, PairedDecoder)
        values = cast(list[Values], rows)
        batch = unmasked_pairs(stem, [part.decoder for part in decoder.parts], values, sample_ids, keys)
        return replace(batch, lost=lost)
    stacked = decoder.stack(rows)
    return Batch(
        modality=stem.name,
        inputs=stacked.inputs,
        valid=stacked.valid,
        masked_rt=torch.zeros(len(rows), stacked.positions, dtype=torch.bool),
        sample_ids=sample_ids,
        keys=keys,
        lost=lost,
        grid=stacked.grid or (),
        extra_tokens=stem.extra_tokens,
        real_bt=None if stacked.real_bt is None else torch.from_numpy(stacked.real_bt),
    )


@dataclass
class LabelledSet:
    """The samples of a set of shards that have a label. Iterating is deterministic and needs no other rank.

    With several ranks, each iterates over the same batches. Samples that cannot be read are left out and counted in
    the batch's `lost`; the first of them are logged. With transcripts, recordings are not cut at
    `data.speech.max_seconds`.
    """

    shards: str
    modality: str
    data: DataConfig
    model: ModelConfig
    batch_size: int = 64
    limit: int | None = None
    """At most this many samples, spread evenly over the set."""
    require_labels: bool = True
    """False: samples without a label are read, too, with label -1."""
    labels: Labels = field(default_factory=ClassLabels)
    masking: MaskingConfig | None = None
    """Mask like this, the same positions at every reading; null: nothing is masked."""
    step: int = 0
    """Masks are drawn as at this step of a run with seed 0."""
    compat: CompatConfig = field(default_factory=CompatConfig)
    """Quirks of the reference that masks are drawn with."""
    min_seconds: float = 0.0
    """Recordings that are shorter are left out."""
    by_length: int = 1
    """Samples of so many batches are sorted by length before they are cut into batches, the longest first, so that
    little is padded. Where all samples are of one size, and with 1, batches are in the stored order."""
    found: ShardSet | None = None
    """The shards, where the caller has found them; null: those of the pattern."""
    cut: int = field(init=False, default=0)
    """Samples that are longer than what is read of them."""

    def __post_init__(self) -> None:
        source = SourceConfig(shards=self.shards, modality=self.modality)
        self._stem = modalities.of(self.model, self.modality)
        self._found = self._stem.read(self.found or find_shards(source))
        if not self._found.indexed:
            raise DataError(f"The shards of {self.shards!r} have no index.", "Make one with `d2v index`.")
        check_before_start(self._found, source, self._stem.content, self.data.max_bad_ratio)
        self.classes = agreed_classes(self._found.class_names)
        self.tokenizer = wanted_tokenizer(self.data.text.tokenizer, self._found.tokenizer)
        if self._stem.uses_tokenizer:
            self._found.require_tokenizer(self.shards, self.tokenizer)
        self._faults: list[Fault] = []
        labelled, lengths = [], []
        for k in range(len(self._found.paths)):
            members = self._found.members(k)
            labelled.append(np.flatnonzero(self._wanted(members)))
            lengths.append(np.asarray(members.length_n[labelled[-1]]))
        length_n = np.concatenate(lengths)
        longest = int(length_n.max(initial=0))
        self._decoder = self._stem.build_decoder(self._decoded(longest), self.tokenizer)
        shard_n = np.repeat(np.arange(len(labelled)), [len(items) for items in labelled])
        item_n = np.concatenate(labelled)
        if len(item_n) == 0:
            raise DataError(
                f"No sample of {self.shards!r} has a label (.{self.labels.extension}).", "Give labelled shards."
            )
        if self.limit is not None and self.limit < len(shard_n):
            chosen = np.linspace(0, len(shard_n) - 1, self.limit).astype(int)
            shard_n, item_n, length_n = shard_n[chosen], item_n[chosen], length_n[chosen]
        order_n = self._order(length_n)
        self._shard_n, self._item_n = shard_n[order_n], item_n[order_n]
        longest_read = self._stem.longest_read(self._decoded(longest))
        self.cut = 0 if longest_read is None else int((length_n > longest_read).sum())

    def __len__(self) -> int:
        """Samples, readable or not."""
        return len(self._shard_n)

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        """Batches, and their labels as `labels` stacks them (classes: int64 (B,))."""
        for batch in self.share(0, 1):
            if batch is not None:
                yield batch

    def read(self) -> list[tuple[Batch, Tensor]]:
        """All batches, in memory; says how many samples were lost. Raises DataError where all were."""
        found = list(self)
        lost = len(self) - sum(len(batch.keys) for batch, _ in found)
        if not found:
            raise self.nothing_readable()
        if lost:
            log.warning("%d of %d labelled samples of %s are lost", lost, len(self), self.shards)
        return found

    @property
    def batches(self) -> int:
        """Batches of an iteration, readable or not."""
        return -(-len(self) // self.batch_size)

    def share(self, part: int, parts: int) -> Iterator[tuple[Batch, Tensor] | None]:
        """Batch number `part` and every `parts`-th after it; None for one of which nothing can be read."""
        for read in self.reads(part, parts):
            for fault in read.faults:
                self._lose(fault)
            yield None if read.batch is None else (read.batch, read.labels)

    def reads(self, part: int, parts: int) -> Iterator[Read]:
        """Likewise, with the faults of what cannot be read, which are not logged."""
        store = open_store(self._found, self.data)
        try:
            for number in range(part, self.batches, parts):
                rows = slice(number * self.batch_size, (number + 1) * self.batch_size)
                yield self._batch(store, self._shard_n[rows].tolist(), self._item_n[rows].tolist())
        finally:
            store.close()

    @property
    def tokenizer_sha256(self) -> str | None:
        """Checksum of the tokenizer that ids are of; None where it is not known or there is no text."""
        if not self._stem.uses_tokenizer:
            return None
        if self.tokenizer is not None and "npy" not in self._found.members(0).extensions:
            return tokenizer_sha256(self.tokenizer)
        assert self._found.index is not None
        return self._found.index.tokenizer_sha256

    def nothing_readable(self, faults: Sequence[Fault] = ()) -> DataError:
        """What to raise where every sample was lost. `faults`: of `reads`."""
        first = f", the first: {known[0]}" if (known := [*self._faults, *faults]) else ""
        return DataError(f"No sample of {self.shards!r} can be read{first}.", "See `d2v inspect`.")

    def _decoded(self, longest: int) -> DataConfig:
        """How to decode. `longest`: of the samples, as the index counts them."""
        if not isinstance(self.labels, Transcripts):
            return self.data
        # A transcript is of the whole recording: words that were cut off would count as errors.
        return self._stem.uncut(self.data, longest)

    def _lose(self, fault: Fault) -> None:
        """Log the first faults, each once however often the set is read."""
        if fault not in self._faults and len(self._faults) < _NAMED:
            self._faults.append(fault)
            log.warning("lost a labelled sample: %s", fault)

    def _order(self, length_n: NDArray[np.int64]) -> NDArray[np.int64]:
        """The order in which samples of these lengths, as the index counts them, are cut into batches."""
        numbers_n = np.arange(len(length_n))
        if self.by_length == 1 or self._stem.unit is None:
            return numbers_n
        longest = self._stem.longest_read(self.data)
        read_n = length_n if longest is None else length_n.clip(max=longest)
        return np.lexsort((-read_n, numbers_n // (self.by_length * self.batch_size)))

    def _batch(self, store: SampleStore, shards: list[int], items: list[int]) -> Read:
        rows, labels, keys, ids = [], [], [], []
        faults: list[Fault] = []
        for shard, item in zip(shards, items, strict=True):
            try:
                sample = store.read(shard, item)
                row = self._decoder.evaluation_row(sample)
                known = sample.has(self.labels.extension) or self.require_labels
                label = self.labels.read(sample) if known else None
            except SampleFault as error:
                faults.append(error.fault)
                continue
            except Exception as error:  # a decoder raises anything for damaged content
                faults.append(store.describe(shard, item, f"cannot be decoded: {type(error).__name__}: {error}"))
                continue
            rows.append(row)
            labels.append(label)
            keys.append(sample.key)
            ids.append(shard << 32 | item)
        if not rows:
            return Read(None, None, faults)
        if self.masking is not None:
            batch = self._masked(rows, keys, np.array(ids), lost=len(faults))
        else:
            batch = unmasked(self._stem, self._decoder, rows, torch.tensor(ids), tuple(keys), len(faults))
        return Read(batch, self.labels.stack(labels), faults)

    def _wanted(self, members: Members) -> NDArray[np.bool_]:
        wanted = np.ones(len(members), dtype=bool)
        if self.min_seconds > 0:
            # -1: it could not be read. It is lost, which is counted, and not too short.
            wanted &= (members.length_n >= self.min_seconds * SAMPLE_RATE) | (members.length_n < 0)
        if not self.require_labels:
            return wanted
        if self.labels.extension not in members.extensions:
            return np.zeros(len(members), dtype=bool)
        return wanted & (members.member_size_ne[:, members.extensions.index(self.labels.extension)] > 0)

    def _masked(self, rows: list[NDArray[Any]], keys: list[str], id_n: NDArray[np.int64], lost: int) -> Batch:
        """The batch as training step `step` of a run with seed 0 would mask it."""
        assert self.masking is not None
        collator = Collator(self.modality, self._decoder, self.model, self.masking, self.compat, seed=0)
        planned = PlannedBatch(0, np.zeros_like(id_n), id_n >> 32, id_n & (2**32 - 1))
        named = [Row(key, row) for key, row in zip(keys, rows, strict=True)]
        return collator.batch(named, planned, list(range(len(rows))), step=self.step, source="held out", lost=lost)
