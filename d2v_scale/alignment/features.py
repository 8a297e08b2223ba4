"""One vector a concept, layer and stem: of an encoder, of the samples as they are, and of their length alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.alignment.concepts import ConceptSet, Part, Place
from d2v_scale.batch import Batch
from d2v_scale.data.labelled import unmasked
from d2v_scale.errors import DataError
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.evaluation.raw import character_ngrams
from d2v_scale.modalities.base import Modality
from d2v_scale.model.pooling import mean_over_positions
from d2v_scale.shards.reading import SampleFault
from d2v_scale.shards.rows import Decoder


@dataclass
class Means:
    """Features of a stem's samples, averaged over the samples of each concept. L layers, N concepts, width D."""

    layers_lnd: Tensor
    """float32; rows of concepts without such a sample are 0."""
    present_n: Tensor
    """bool."""


@dataclass
class Read:
    """What became of the samples of one stem."""

    used: int = 0
    same: int = 0
    """Equal to another of their concept: they count once."""
    beyond: int = 0
    """More than were asked for of a concept."""
    missing: int = 0
    """Without such a member."""
    lost: list[str] = field(default_factory=list)
    """Unreadable: what, and why."""


class StemSamples:
    """The samples of a set that a stem reads, decoded once an iteration, in batches."""

    def __init__(
        self,
        samples: ConceptSet,
        kind: Modality,
        decoder: Decoder,
        per_concept: int | None,
        batch_size: int,
    ) -> None:
        self.kind = kind
        self.concepts = samples.concepts
        self.read = Read()
        self._set, self._decoder, self._batch_size = samples, decoder, batch_size
        self.places = self._chosen(samples.places, per_concept)
        self._number = {name: number for number, name in enumerate(self.concepts)}

    def _chosen(self, places: list[Place], per_concept: int | None) -> list[Place]:
        content = self.kind.content
        seen: dict[str, set[str]] = {}
        chosen = []
        for place in places:
            mine = seen.setdefault(place.concept, set())
            digest = place.digests.get(content)
            if digest is None:
                self.read.missing += 1
            elif digest in mine:
                self.read.same += 1
            elif per_concept is not None and len(mine) >= per_concept:
                self.read.beyond += 1
            else:
                mine.add(digest)
                chosen.append(place)
        return chosen

    def __iter__(self) -> Iterator[tuple[Batch, Tensor]]:
        """Batches of samples of like size, and the numbers (B,) of their concepts. What cannot be decoded is left out
        and noted in `read`."""
        self.read.used, self.read.lost = 0, []
        # A batch is as long as its longest: recordings of seconds beside some of a minute would mostly be padding.
        ordered = sorted(self.places, key=lambda place: place.sizes.get(self.kind.content, 0))
        for start in range(0, len(ordered), self._batch_size):
            rows, kept = [], []
            for place in ordered[start : start + self._batch_size]:
                try:
                    rows.append(self._decoder.evaluation_row(self._part(place)))
                    kept.append(place)
                except SampleFault as error:
                    self.read.lost.append(f"{place.key}: {error.fault.reason}")
                except Exception as error:  # a decoder raises anything for damaged content
                    self.read.lost.append(f"{place.key}: cannot be decoded: {type(error).__name__}: {error}")
            self.read.used += len(rows)
            if rows:
                ids = torch.tensor([place.shard << 32 | place.number for place in kept])
                batch = unmasked(self.kind, self._decoder, rows, ids, tuple(place.key for place in kept))
                yield batch, torch.tensor([self._number[place.concept] for place in kept])

    def one(self, concept: str) -> Batch | None:
        """The first readable sample of a concept, by itself."""
        return self._first([place for place in self.places if place.concept == concept], 1)

    def first(self, count: int) -> Batch | None:
        """The first readable samples, at most so many."""
        return self._first(self.places, count)

    def _first(self, places: list[Place], count: int) -> Batch | None:
        rows: list[NDArray[Any]] = []
        keys: list[str] = []
        for place in places:
            if len(rows) == count:
                break
            try:
                rows.append(self._decoder.evaluation_row(self._part(place)))
                keys.append(place.key)
            except Exception:
                continue
        if not rows:
            return None
        return unmasked(self.kind, self._decoder, rows, torch.arange(len(rows)), tuple(keys))

    def caption(self, concept: str) -> str | None:
        """The text of the concept's first sample, where it is no ids."""
        return next((place.caption for place in self.places if place.concept == concept), None)

    def texts(self) -> list[str] | None:
        """The captions, in the order of iteration; None where the stem reads anything else, or ids."""
        found = [place.caption for place in self.places]
        return [text for text in found if text] if self.kind.content == "text" and all(found) else None

    def _part(self, place: Place) -> Part:
        return Part(self._set.shards.read(place.shard, place.number), self.kind.content)


View = Callable[[Batch], Tensor]
"""Features (L, B, D) of a batch."""


@torch.no_grad()
def averaged(samples: StemSamples, views: Sequence[View]) -> list[Means]:
    """What each of `views` makes of the samples, which are decoded once for all of them."""
    pooled = [_Pooled(len(samples.concepts)) for _ in views]
    for batch, concepts_b in samples:
        for sums, view in zip(pooled, views, strict=True):
            sums.add(view(batch), concepts_b)
    return [sums.means() for sums in pooled]


def encoded(encoder: FrozenEncoder) -> View:
    """The mean over valid positions of every main block's output. The view raises DataError where one is not finite."""

    def view(batch: Batch) -> Tensor:
        moved = batch.to(encoder.device)
        valid_bt = encoder.valid_positions(moved)
        states = encoder.hidden_states(moved)
        features_lbd = torch.stack([mean_over_positions(x_btd, valid_bt) for x_btd in states]).cpu()
        if not bool(features_lbd.isfinite().all()):
            raise DataError(
                f"{encoder.source}: features of the stem {batch.modality!r} are not finite.", "The run has diverged."
            )
        return features_lbd

    return view


def raw(samples: StemSamples) -> tuple[str, View]:
    """What the samples are without any model (pixels, log-mel spectra, character n-grams): what it is called, and one
    layer of it."""
    if samples.texts() is None:
        return samples.kind.raw_name, lambda batch: samples.kind.raw_features(batch).float()[None]
    texts = {place.shard << 32 | place.number: place.caption for place in samples.places}

    def ngrams(batch: Batch) -> Tensor:
        return character_ngrams([texts[one] or "" for one in batch.sample_ids.tolist()])[None]

    return "character n-grams", ngrams


def lengths(batch: Batch) -> Tensor:
    """How much of each sample there is, and its logarithm: one layer."""
    size_b = torch.full((len(batch.inputs),), float(batch.inputs[0].numel()))
    if batch.valid is not None:
        size_b = batch.valid.flatten(1).sum(dim=1).float()
    return torch.stack([size_b, size_b.clamp(min=1).log()], dim=1)[None]


class _Pooled:
    """Sums over the samples of each concept."""

    def __init__(self, concepts: int) -> None:
        self._count_n = torch.zeros(concepts)
        self._sum_lnd: Tensor | None = None

    def add(self, features_lbd: Tensor, concepts_b: Tensor) -> None:
        if self._sum_lnd is None:
            layers, _, width = features_lbd.shape
            self._sum_lnd = torch.zeros(layers, len(self._count_n), width)
        self._sum_lnd.index_add_(1, concepts_b, features_lbd.float().cpu())
        self._count_n.index_add_(0, concepts_b, torch.ones(len(concepts_b)))

    def means(self) -> Means:
        if self._sum_lnd is None:
            return Means(torch.zeros(1, len(self._count_n), 1), self._count_n > 0)
        return Means(self._sum_lnd / self._count_n.clamp(min=1)[None, :, None], self._count_n > 0)


def kind_of(encoder: FrozenEncoder, stem: str) -> Modality:
    """What the stem says of itself."""
    return modalities.of(encoder.recipe.model, stem)
