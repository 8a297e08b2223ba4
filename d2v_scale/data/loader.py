"""The steps of a run as batches: planned for all ranks, decoded by worker processes, resumed from a few integers."""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.collate import Collator, read_rows
from d2v_scale.data.config import DataConfig, LeaveOut
from d2v_scale.data.counters import Counters, SourceCount, Tally
from d2v_scale.data.cropping import warn_of_cropping
from d2v_scale.data.labels import Labels
from d2v_scale.data.leaving_out import LeavingOut
from d2v_scale.data.paired import PairedCollator
from d2v_scale.data.source import Source, mixing_weights, open_source
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.data2vec.config import CompatConfig, MaskingConfig
from d2v_scale.errors import CheckpointError, DataError, DataStarved, UserError, Verdict
from d2v_scale.modalities.paired.decoder import PairedDecoder
from d2v_scale.modalities.paired.modality import Paired
from d2v_scale.modalities.text.tokenizer import tokenizer_sha256
from d2v_scale.model.config import ModelConfig
from d2v_scale.process.signals import worker_signals
from d2v_scale.shards.forking import forking
from d2v_scale.shards.plan import Cursor, Mixture, PlannedBatch
from d2v_scale.shards.reading import Fault, SampleStore
from d2v_scale.shards.rows import Decoder
from d2v_scale.shards.stream import StreamStore

log = logging.getLogger(__name__)

# What the DataLoader itself raises for a time-out or a dead worker; other errors mean what they say.
_NOT_ARRIVED = ("DataLoader timed out", "DataLoader worker (pid")

_LEAST_IN_A_SHARD = 1000
_MOST_SLACK = 50

BatchUnit = Literal["samples", "seconds", "tokens"]


@dataclass
class StepTask:
    """What one rank decodes for one step."""

    step: int
    planned: list[PlannedBatch]
    """One per micro-batch."""


@dataclass
class DecodedStep:
    """A worker's answer to a `StepTask`."""

    step: int
    batches: list[Batch]
    faults: list[list[Fault]] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    """Of all three one per micro-batch."""

    def pin_memory(self) -> "DecodedStep":
        """Called by the DataLoader's pinning thread."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class _StepDataset(Dataset[DecodedStep]):
    """Decodes tasks. A copy lives in every worker; files are opened there."""

    def __init__(
        self,
        sources: Sequence[Source | StreamedSource],
        decoders: list[Decoder],
        collators: Sequence[Collator | PairedCollator],
        seed: int,
    ) -> None:
        self._sources = sources
        self._decoders = decoders
        self._collators = collators
        self._seed = seed
        self._stores: list[SampleStore | StreamStore] | None = None

    def __getitem__(self, task: StepTask) -> DecodedStep | UserError | Verdict:  # type: ignore[override]
        """The step, or our own error: raised in a worker, PyTorch would make another of it."""
        try:
            return self._decoded(task)
        except (UserError, Verdict) as error:
            return error

    def _decoded(self, task: StepTask) -> DecodedStep:
        if self._stores is None:
            self._stores = [source.open_store() for source in self._sources]
        decoded = DecodedStep(task.step, [])
        for planned in task.planned:
            k = planned.source
            store = self._stores[k]
            rows, kept, faults = read_rows(planned, store, self._decoders[k], self._seed)
            if isinstance(store, StreamStore):
                faults += store.take_damage()
            batch = self._collators[k].batch(
                rows, planned, kept, step=task.step, source=self._sources[k].name, lost=len(faults)
            )
            decoded.batches.append(batch)
            decoded.faults.append(faults)
            tally = _tally(batch, planned, kept, faults, self._sources[k].stem)
            for number, row in zip(kept, rows, strict=True):
                tally.count_parts(row, self._sources[k].shards.paths[int(planned.shard_n[number])])
            decoded.tallies.append(tally)
        return decoded


def _tally(
    batch: Batch, planned: PlannedBatch, kept: list[int], faults: list[Fault], stem: modalities.Modality
) -> Tally:
    delivered_n = np.zeros(len(planned), dtype=bool)
    delivered_n[kept] = True
    lost = Counter(planned.epoch_n[~delivered_n].tolist())
    # A stream hands out samples that nobody planned, and finds damage beside those it was asked for.
    lost[batch.epoch] += len(faults) - lost.total()
    real, padded = stem.sizes(batch) if kept else (0, 0)
    return Tally(
        delivered=dict(Counter(planned.epoch_n[delivered_n].tolist())),
        lost=dict(+lost),
        real=real,
        padded=padded,
        missing=batch.missing if kept else 0,
        blank=max(0, len(planned) - len(kept) - len(faults)),
    )


class StepLoader:
    """Iterates over steps without end; each item is this rank's micro-batches of one optimizer step, masks drawn.

    What a step holds is a pure function of the configuration, the seed and the state, at any number of ranks and
    workers. Samples that cannot be read leave a smaller batch; `alarm()` says when there are too many.
    """

    labels: Labels | None = None
    """How labels are read; pretraining has none."""

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        masking: MaskingConfig | Mapping[str, MaskingConfig],
        compat: CompatConfig | None = None,
        *,
        seed: int,
        global_batch_size: int,
        batch_unit: BatchUnit = "samples",
        accumulation: int = 1,
        dp_rank: int = 0,
        dp_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Opens and checks the indexes: raises ConfigError and DataError, before any training step. `masking`: of all
        stems, or by a stem's name."""
        data.check(model.modalities)
        self._data = data
        self._device = torch.device(device)
        self._rounds = accumulation // data.sources_of_step()
        """Micro-batches of each source that a step reads."""
        self._shares = dp_size * self._rounds
        self._first_share = dp_rank * self._rounds
        compat = compat or CompatConfig()
        self.sources = self._open_sources(model, seed, dp_rank, dp_size)
        sizes = [(source.batch_size or global_batch_size, source.batch_unit or batch_unit) for source in data.sources]
        self._plans = [source.plan(*size) for source, size in zip(self.sources, sizes, strict=True)]
        self._mixture = Mixture(mixing_weights(data, self.sources, sizes), data.temperature, seed)
        decoders = [self._make_decoder(source, model) for source in self.sources]
        masks = {m: masking if isinstance(masking, MaskingConfig) else masking[m] for m in model.modalities}
        collators: list[Collator | PairedCollator] = []
        for source, one, decoder in zip(data.sources, self.sources, decoders, strict=True):
            if isinstance(one.stem, Paired):
                assert isinstance(decoder, PairedDecoder)
                own = [masks[stem] for stem in source.stems]
                collators.append(PairedCollator(one.stem, decoder, own, source.hide_whole, seed, self.labels))
            else:
                own_masks = masks[source.modality]
                collators.append(Collator(source.modality, decoder, model, own_masks, compat, seed, self.labels))
        self._dataset = _StepDataset(self.sources, decoders, collators, seed)
        self._step = 0
        streams = {source.name for source in self.sources if isinstance(source, StreamedSource)}
        self.leaving_out = LeavingOut([source.name for source in self.sources], data.leave_out, streams)
        self._cursors = [Cursor() for _ in self.sources]
        self._counters = self._make_counters(dp_size)
        self._pending: deque[tuple[int, list[Cursor], list[PlannedBatch]]] = deque()
        self._steps: Iterator[DecodedStep] | None = None

    def _make_counters(self, dp_size: int) -> Counters:
        names, ratio = [source.name for source in self.sources], self._data.max_bad_ratio
        # A stream does not know how long it is, and meets its shards one after the other: one bad one is not all.
        streamed = sum(len(source.shards.paths) for source in self.sources if isinstance(source, StreamedSource))
        rows = _LEAST_IN_A_SHARD * streamed + sum(source.items_per_epoch for source in self.sources)
        return Counters(names, ratio, rows / dp_size, slack=min(max(1, streamed // dp_size), _MOST_SLACK))

    def _open_sources(
        self, model: ModelConfig, seed: int, dp_rank: int, dp_size: int
    ) -> Sequence[Source | StreamedSource]:
        data = self._data
        sources = [open_source(data, k, model, seed, dp_rank, dp_size) for k in range(len(data.sources))]
        for source in sources:
            if isinstance(source, Source) and source.items_per_epoch < dp_size:
                raise DataError(
                    f"Data source {source.name!r} has {source.items_per_epoch} samples, fewer than the {dp_size} "
                    "data-parallel ranks: some would never be given one",
                    "Give it more shards, leave it out, or start fewer processes.",
                )
        return sources

    def _make_decoder(self, source: Source | StreamedSource, model: ModelConfig) -> Decoder:
        return source.stem.build_decoder(self._data, source.tokenizer)

    def tokenizer(self, source: str) -> Path | None:
        """The tokenizer of a source's text, by the source's name; None where there is none."""
        return next((one.tokenizer for one in self.sources if one.name == source), None)

    def tokenizer_sha256(self) -> str | None:
        """Checksum of the tokenizer that ids are of; None where it is not known or there is no text."""
        for source in self.sources:
            if not source.stem.uses_tokenizer:
                continue
            if source.shards.index is not None:
                return source.shards.index.tokenizer_sha256
            if source.tokenizer is not None:
                return tokenizer_sha256(source.tokenizer)
        return None

    # -- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the run continues after the last step handed out: a few integers per source."""
        return {
            "step": self._step,
            "sources": {
                source.name: {
                    "epoch": cursor.epoch,
                    "window": cursor.window,
                    "offset": cursor.offset,
                    "fingerprint": source.fingerprint,
                }
                for source, cursor in zip(self.sources, self._cursors, strict=True)
            },
        }

    def load_state_dict(self, state: dict[str, Any], lately: Sequence[list[list[int]]] = ()) -> None:
        """Continue from `state`, at any number of ranks and workers. Raises CheckpointError for other data. `lately`:
        of the process that made it, where that is to count as this one."""
        saved = state["sources"]
        names = [source.name for source in self.sources]
        if sorted(saved) != sorted(names):
            raise CheckpointError(
                f"The checkpoint's data sources are {', '.join(sorted(saved))}, the run's {', '.join(sorted(names))}.",
                "Resume with the same sources.",
            )
        for source in self.sources:
            if saved[source.name]["fingerprint"] != source.fingerprint:
                raise CheckpointError(
                    f"The shards of data source {source.name!r} are not those the checkpoint was trained on, "
                    "or they are planned differently (seed, batch size, window, lengths, packing).",
                    "Give the same shards in the same order, or start a new run with --init_from.",
                )
        self._cursors = [Cursor(saved[name]["epoch"], saved[name]["window"], saved[name]["offset"]) for name in names]
        self._step = state["step"]
        self.leaving_out.forget()
        self.leaving_out.recall(lately)
        self._steps = None
        self._pending.clear()

    # -- iteration -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """This rank's micro-batches of the next step. Raises DataStarved when none arrives in time."""
        if self._steps is None:
            self._steps = self._start()
        try:
            decoded = next(self._steps)
        except RuntimeError as error:
            if not str(error).startswith(_NOT_ARRIVED):
                raise
            raise DataStarved(f"No batch arrived for step {self._step}: {error}") from error
        step, cursors, read = self._pending.popleft()
        assert step == decoded.step == self._step, "steps arrive in order"
        for place, planned in enumerate(read):
            own = slice(place, None, len(read))
            faults = [fault for of_one in decoded.faults[own] for fault in of_one]
            self._counters.count(planned, decoded.tallies[own], faults, cursors)
        self.leaving_out.note(self._cursors)
        self._step, self._cursors = step + 1, cursors
        return decoded.batches

    def lately(self, steps: int) -> list[list[list[int]]]:
        """Where the latest so many steps began to read, so that `load_state_dict` can go on as if in one process."""
        return self.leaving_out.lately(steps)

    def read_lately(self, steps: int) -> list[LeaveOut]:
        """What the latest steps have read, at most so many, and of those before the last `load_state_dict` only what it
        was told."""
        return self.leaving_out.latest(steps, self._cursors)

    def counters(self) -> dict[str, float]:
        """Totals of this rank since the start: see `Counters.values`."""
        return self._counters.values()

    def take_counts(self) -> dict[str, SourceCount]:
        """What this rank was given by source since the last call: see `RunTotals`."""
        return self._counters.take()

    def faults(self) -> dict[str, int]:
        """Lost samples of this rank by shard."""
        return dict(self._counters.lost_by_shard)

    def alarm(self) -> str | None:
        """Why the run should end as starved, or None: more than `max_bad_ratio` of the samples were lost."""
        return self._counters.alarm()

    def close(self) -> None:
        """End the worker processes."""
        self._steps = None
        self._pending.clear()

    def _start(self) -> Iterator[DecodedStep]:
        for source, plan, cursor in zip(self.sources, self._plans, self._cursors, strict=True):
            warn_of_cropping(source, plan, cursor, self._data)
        workers = self._data.workers
        loader: DataLoader[Any] = DataLoader(
            self._dataset,
            # The sampler runs in this process, ahead of the workers; what it yields is what they are asked for.
            sampler=self._tasks(),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self._data.prefetch if workers else None,
            timeout=self._data.timeout_s if workers else 0,
            worker_init_fn=_start_worker,
            pin_memory=self._device.type == "cuda",
        )
        with forking():
            steps = _raising(iter(loader))
        return on_device(steps, self._device) if self._device.type == "cuda" else steps

    def _tasks(self) -> Iterator[StepTask]:
        step, cursors = self._step, list(self._cursors)
        together = self._data.mixing == "together"
        while True:
            read: list[PlannedBatch] = []
            for source in range(len(self.sources)) if together else [self._mixture.source_of(step)]:
                planned, cursors[source] = self.leaving_out.next_batch(self._plans[source], source, cursors[source])
                read.append(planned)
            # The sources take turns, in the same order on all ranks: at any time these run the same layers.
            parts = range(self._first_share, self._first_share + self._rounds)
            shares = [planned.share(part, self._shares) for part in parts for planned in read]
            self._pending.append((step, list(cursors), read))
            yield StepTask(step, shares)
            step += 1


def _raising(steps: Iterator[DecodedStep | UserError | Verdict]) -> Iterator[DecodedStep]:
    for decoded in steps:
        if isinstance(decoded, Exception):
            # The traceback keeps this frame: with `steps` in it workers would outlive the error, and delay the exit.
            del steps
            raise decoded
        yield decoded


def on_device(steps: Iterator[DecodedStep], device: torch.device) -> Iterator[DecodedStep]:
    """Copies each step to the device on a stream of its own while the one before it is used."""
    stream = torch.cuda.Stream(device)

    def copied(decoded: DecodedStep) -> tuple[DecodedStep, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            moved = replace(decoded, batches=[batch.to(device) for batch in decoded.batches])
            return moved, stream.record_event()

    ahead: tuple[DecodedStep, torch.cuda.Event] | None = None
    for decoded in steps:
        ready, ahead = ahead, copied(decoded)
        if ready is not None:
            step, arrived = ready
            current = torch.cuda.current_stream(device)
            current.wait_event(arrived)
            for batch in step.batches:
                batch.record_stream(current)
            yield step


def _start_worker(_worker: int) -> None:
    worker_signals()
    torch.set_num_threads(1)
