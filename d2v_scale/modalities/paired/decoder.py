"""Samples with members side by side to rows that have a part for each stem, as far as it is there."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from d2v_scale.shards.reading import RawSample, SampleFault, Store
from d2v_scale.shards.rows import PartDecoder, Row, Stacked

Values = tuple[NDArray[Any] | None, ...]
"""Of each stem what it reads of a sample; None: the sample has no such part."""


@dataclass(frozen=True)
class Part:
    """A stem and how its part of a sample is read."""

    name: str
    decoder: PartDecoder


class PairedDecoder:
    """A part that is not there, or cannot be decoded, is named and counted; the others make the row without it."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.draws = sum(part.decoder.draws for part in parts)

    def training_row(self, store: Store, shard: int, item: int, length: int, draws: NDArray[np.float64]) -> Row:
        """The parts of one sample, each cropped and augmented as its stem's samples are, but for nobody else's length.
        Raises SampleFault where none can be had."""
        del length
        return self._row(store.read(shard, item), draws)

    def evaluation_row(self, sample: RawSample) -> Values:  # type: ignore[override]
        """The parts of one sample without randomness."""
        return self._values(sample, None)[0]

    def stack(self, rows: list[NDArray[Any]]) -> Stacked:
        """Each part is stacked by itself (`data.paired`)."""
        raise AssertionError("parts are stacked one by one")

    def blank(self) -> Values:  # type: ignore[override]
        """A row of a batch that has none."""
        return (None,) * len(self.parts)

    def _row(self, sample: RawSample, draws: NDArray[np.float64]) -> Row:
        values, lacking, cropped = self._values(sample, draws)
        return Row(sample.key, values, lacking=lacking, cropped=cropped)  # type: ignore[arg-type]

    def _values(
        self, sample: RawSample, draws: NDArray[np.float64] | None
    ) -> tuple[Values, tuple[tuple[str, str], ...], tuple[str, ...]]:
        """What there is, what there is not and why, and what is longer than what is read of it."""
        values: list[NDArray[Any] | None] = []
        lacking: list[tuple[str, str]] = []
        cropped: list[str] = []
        first = 0
        for part in self.parts:
            own = None if draws is None else draws[first : first + part.decoder.draws]
            first += part.decoder.draws
            decoder = part.decoder
            if not any(sample.has(extension) for extension in decoder.extensions):
                values.append(None)
                lacking.append((part.name, "no such member"))
                continue
            try:
                value, is_longer = (
                    (decoder.evaluation_row(sample), False) if own is None else decoder.part_row(sample, own)
                )
                values.append(value)
                cropped += [part.name] * is_longer
            except SampleFault as error:
                values.append(None)
                lacking.append((part.name, error.fault.reason))
            except Exception as error:  # a decoder raises anything for damaged content; the other parts are sound
                values.append(None)
                lacking.append((part.name, f"cannot be decoded: {type(error).__name__}: {error}"))
        if all(value is None for value in values):
            raise sample.fault("; ".join(f"no {name}: {why}" for name, why in lacking))
        return tuple(values), tuple(lacking), tuple(cropped)
