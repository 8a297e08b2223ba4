"""What the whole run was given: over all ranks, and over every restart, for the record and the checkpoint."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from d2v_scale.data.counters import EpochCount, SourceCount
from d2v_scale.data.source import Source
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.parallel.groups import Topology

log = logging.getLogger(__name__)

_DRY_ROWS = 500


@dataclass
class _SourceTotals:
    delivered: int = 0
    lost: int = 0
    left_out: int = 0
    planned: int = 0
    real: int = 0
    """Tokens, samples of audio, or patches of arrays."""
    missing: int = 0
    """Patches of arrays that miss a value."""
    missing_parts: dict[str, int] = field(default_factory=dict)
    """Samples without a part, by the part's stem."""
    cropped_parts: dict[str, int] = field(default_factory=dict)
    """Samples of which a part is longer than what is read of it, by the part's stem."""
    epochs: dict[int, EpochCount] = field(default_factory=dict)
    """Those that are not over."""
    closed: EpochCount | None = None
    """The last one that is."""
    dry: int = 0
    """Rows that were planned since one was delivered to any rank."""
    unchecked: int = -1
    """Epochs up to this one were begun by a version that kept no totals."""


class RunTotals:
    """Sums of all ranks' `Counters`. When an epoch is over, it compares what the index promised with what arrived."""

    def __init__(self, sources: Sequence[Source | StreamedSource]) -> None:
        self._sources = list(sources)
        self._forget()

    def _forget(self) -> None:
        self._totals = {source.name: _SourceTotals() for source in self._sources}
        self._epochs = {source.name: 0 for source in self._sources}
        self._recent: dict[str, float] = {}
        self._recent_real, self._recent_padded = 0, 0
        self._recent_cropped, self._recent_uncropped = 0, 0

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: a few integers per source."""
        return {
            name: {
                "delivered": totals.delivered,
                "lost": totals.lost,
                "left_out": totals.left_out,
                "planned": totals.planned,
                "real": totals.real,
                "missing": totals.missing,
                "missing_parts": totals.missing_parts,
                "cropped_parts": totals.cropped_parts,
                "unchecked": totals.unchecked,
                "epochs": {str(number): vars(epoch) for number, epoch in totals.epochs.items()},
            }
            for name, totals in self._totals.items()
        }

    def load_state_dict(self, state: dict[str, Any] | None, data: dict[str, Any]) -> None:
        """Continue from `state`; None: the checkpoint has none. `data`: the loader's state of the same checkpoint.
        What was counted before, of steps that the run takes back, is forgotten."""
        self._forget()
        for name, totals in self._totals.items():
            if state is None or name not in state:
                totals.unchecked = data["sources"][name]["epoch"]
                continue
            saved = state[name]
            totals.epochs = {int(number): EpochCount(**epoch) for number, epoch in saved["epochs"].items()}
            self._epochs[name] = max(totals.epochs, default=0)
            for key in ("delivered", "lost", "planned", "real", "unchecked"):
                setattr(totals, key, saved[key])
            totals.left_out = saved.get("left_out", 0)
            totals.missing = saved.get("missing", 0)
            totals.missing_parts = dict(saved.get("missing_parts", {}))
            totals.cropped_parts = dict(saved.get("cropped_parts", {}))

    # -- counting ------------------------------------------------------------------------------------------------

    def collect(self, counts: dict[str, SourceCount], topology: Topology) -> None:
        """Add what this rank was given since the last call. Waits for the device. Collective: all ranks must call."""
        flat: list[int] = []
        for source in self._sources:
            mine = counts[source.name]
            flat += [mine.real, mine.padded, mine.missing]
            for part in _parts(source):
                flat += [mine.missing_parts[part], mine.cropped_parts[part]]
            for number in sorted(mine.epochs):
                flat += [mine.epochs[number].delivered, mine.epochs[number].lost]
        summed = torch.tensor(flat, dtype=torch.float64, device=topology.device)
        # What was planned is the same on all ranks, and so are the epochs and the length of this list.
        topology.sum_over_replicas(summed)
        numbers = iter(summed.long().tolist())
        for source in self._sources:
            self._add(source, counts[source.name], numbers)

    def _add(self, source: Source | StreamedSource, mine: SourceCount, numbers: Any) -> None:
        totals = self._totals[source.name]
        real, padded, missing = next(numbers), next(numbers), next(numbers)
        for part in _parts(source):
            totals.missing_parts[part] = totals.missing_parts.get(part, 0) + next(numbers)
            totals.cropped_parts[part] = totals.cropped_parts.get(part, 0) + next(numbers)
        totals.real += real
        totals.missing += missing
        self._recent_real += real
        self._recent_padded += padded
        kind = source.stem
        if kind.cropped:
            self._recent_cropped += mine.cropped
            self._recent_uncropped += mine.uncropped
        if kind.throughput is not None:
            name, values = kind.throughput
            self._recent[name] = self._recent.get(name, 0.0) + real / values
        before = totals.delivered
        totals.dry += sum(epoch.planned for epoch in mine.epochs.values())
        for number in sorted(mine.epochs):
            delivered, lost = next(numbers), next(numbers)
            epoch = totals.epochs.setdefault(number, EpochCount())
            epoch.planned += mine.epochs[number].planned
            epoch.left_out += mine.epochs[number].left_out
            epoch.delivered += delivered
            epoch.lost += lost
            totals.planned += mine.epochs[number].planned
            totals.left_out += mine.epochs[number].left_out
            totals.delivered += delivered
            totals.lost += lost
        if totals.delivered > before:
            totals.dry = 0
        if totals.epochs:
            self._epochs[source.name] = max(totals.epochs)
        for number in [number for number in sorted(totals.epochs) if number < self._epochs[source.name]]:
            totals.closed = totals.epochs.pop(number)
            self._check(source, number, totals)

    def _check(self, source: Source | StreamedSource, number: int, totals: _SourceTotals) -> None:
        epoch = totals.closed
        assert epoch is not None
        if number <= totals.unchecked:
            totals.closed = None
            return
        expected = source.items_per_epoch if source.epoch_is_counted else epoch.planned + epoch.left_out
        told = (
            f"epoch {number} of {source.name}: {expected} expected, {epoch.delivered} delivered, {epoch.lost} lost, "
            f"{epoch.left_out} left out for their length"
        )
        if expected != epoch.delivered + epoch.lost + epoch.left_out:
            log.warning("%s: these do not add up", told)
        elif epoch.lost:
            log.warning("%s", told)
        elif epoch.left_out:
            log.info("%s", told)

    def starved(self) -> str | None:
        """Why the run should end, or None: no rank was given a sample of a source for long. The same on all ranks."""
        for name, totals in self._totals.items():
            if totals.dry >= _DRY_ROWS:
                return f"No sample of {name} could be used by any rank, of the last {totals.dry} that were asked for"
        return None

    # -- record --------------------------------------------------------------------------------------------------

    def figures(self, elapsed_s: float) -> dict[str, float]:
        """For the record, of the run so far: `tokens`, `audio_seconds` (and per second, since the last call),
        `data/delivered`, `data/lost`, `data/left_out` (too short, or with a transcript too long), `data/planned`,
        `data/padding` (share of the inputs since the last call), `data/missing` (patches of arrays that miss a value,
        where there are some), `data/missing_parts/PART` (paired samples without this part), `data/cropped_parts/PART`
        (paired samples with more of this part than is read), `data/cropped` (share of the audio that was lost since
        then because rows take the length of their batch's shortest), and by source `epoch`, `delivered` and of the last
        whole epoch `epoch_planned`, `epoch_delivered`, `epoch_lost`, `epoch_left_out`."""
        totals = self._totals.values()
        values: dict[str, float] = {}
        counted = {unit for source in self._sources if (unit := source.stem.throughput) is not None}
        for name, of_one in sorted(counted, reverse=True):
            sources = [source.name for source in self._sources if source.stem.throughput == (name, of_one)]
            values[name] = sum(self._totals[source].real for source in sources) / of_one
            values[f"{name}_per_second"] = self._recent.pop(name, 0.0) / elapsed_s
        for key in ("delivered", "lost", "left_out", "planned"):
            values[f"data/{key}"] = sum(getattr(one, key) for one in totals)
        values["data/padding"] = 1 - self._recent_real / self._recent_padded if self._recent_padded else 0.0
        self._recent_real, self._recent_padded = 0, 0
        if missing := sum(one.missing for one in totals):
            values["data/missing"] = missing
        for part in dict.fromkeys(part for one in totals for part in one.missing_parts):
            values[f"data/missing_parts/{part}"] = sum(one.missing_parts.get(part, 0) for one in totals)
            values[f"data/cropped_parts/{part}"] = sum(one.cropped_parts.get(part, 0) for one in totals)
        if any(source.stem.cropped for source in self._sources):
            values["data/cropped"] = self._recent_cropped / max(1, self._recent_uncropped)
            self._recent_cropped, self._recent_uncropped = 0, 0
        for name, one in self._totals.items():
            values[f"data/{name}/epoch"] = self._epochs[name]
            values[f"data/{name}/delivered"] = one.delivered
            if one.closed is not None:
                values |= {f"data/{name}/epoch_{key}": count for key, count in vars(one.closed).items()}
                one.closed = None
        return values


def _parts(source: Source | StreamedSource) -> list[str]:
    """The stems of paired samples' parts; of other samples none."""
    parts = source.stem.parts
    return [part.name for part in parts] if len(parts) > 1 else []
