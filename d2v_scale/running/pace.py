"""What every rank spends of a step: data, computation, communication. Every fourth step is measured on all ranks, and
nothing waits for it: a measurement is read when it is long complete, and travels while the next steps compute.

What a rank waits for others is the time in `Work.wait`. A collective of NCCL hands out no such work (it is made to wait
on the device itself), so on GPUs the waiting would be taken for the rank's own computation, and nothing is measured.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from d2v_scale.files import append_line
from d2v_scale.tracking.meters import Stopwatch
from d2v_scale.tracking.stragglers import STRAGGLERS_FILE, Pace, StragglerDetector

if TYPE_CHECKING:
    from d2v_scale.running.loop import AnyRun

log = logging.getLogger("d2v_scale.train")

EVERY = 4
"""Steps between measurements. The third of a slow rank is read at most 20 steps after it became slow."""
PACE_FILE = Path("logs") / "pace.jsonl"
_MOST_RANKS = 64
"""Of which every one has its figures in `PACE_FILE`; of more only the slowest, the median and the fastest."""


class PaceKeeper:
    """Measures this rank's steps and, on rank 0, says who holds the others up."""

    def __init__(self, run: "AnyRun[Any]") -> None:
        """Collective: all ranks must call."""
        factor = run.recipe.tracking.straggler_factor
        self._run = run
        self._measures = run.topology.world_size > 1 and factor is not None and dist.get_backend() != "nccl"
        if not self._measures:
            return
        assert factor is not None
        self._detector = StragglerDetector(factor)
        self._group = dist.new_group(backend="gloo")
        self._last: tuple[int, float, Stopwatch, list[Stopwatch]] | None = None
        """Of the newest measured step: its number, seconds of data, the step, and what it waited for others."""
        self._travels: tuple[int, Any, list[torch.Tensor]] | None = None
        self._data_before = run.meter.spent.get("data", 0.0)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Measure the step inside, where it is its turn. Collective at these: all ranks must call."""
        number = self._run.step + 1
        if not self._measures or number % EVERY:
            yield
            return
        self._receive()
        self._send()
        whole, waits = Stopwatch(), list[Stopwatch]()
        with whole, _waits_timed(waits):
            yield
        data = self._run.meter.spent.get("data", 0.0)
        self._last = number, (data - self._data_before) / EVERY, whole, waits
        self._data_before = data

    def _send(self) -> None:
        """Let the last measurement travel."""
        if self._last is None:
            return
        (number, data, whole, waits), self._last = self._last, None
        waited = sum(one.seconds() for one in waits)
        place = float(self._run.topology.pipeline_rank)
        mine = torch.tensor([data, max(0.0, whole.seconds() - waited), waited, place], dtype=torch.float64)
        every = [torch.empty_like(mine) for _ in range(self._run.topology.world_size)]
        self._travels = number, dist.all_gather(every, mine, group=self._group, async_op=True), every

    def _receive(self) -> None:
        """Look at the measurement that has arrived."""
        if self._travels is None:
            return
        (number, work, every), self._travels = self._travels, None
        work.wait()
        if self._run.topology.rank != 0:
            return
        paces = [Pace(row[0], row[1], row[2], int(row[3])) for row in torch.stack(every).tolist()]
        for one in self._detector.observe(paces):
            log.warning("Step %d: %s", self._run.step, one)
            line = {"time": time.time(), "step": self._run.step, **vars(one)}
            try:
                append_line(self._run.directory / STRAGGLERS_FILE, line)
            except OSError as error:  # a full disk, most likely, which is no reason to end
                log.warning("%s cannot be written: %s", STRAGGLERS_FILE, error)
        if number % self._run.recipe.tracking.log_every < EVERY:
            _record(self._run.directory, number, paces)


def _record(directory: Path, step: int, paces: list[Pace]) -> None:
    """A line of all ranks' seconds, or of many those of three."""
    shown = list(enumerate(paces))
    if len(shown) > _MOST_RANKS:
        ordered = sorted(shown, key=lambda pair: pair[1].own)
        shown = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    figures = {
        name: [round(getattr(pace, name), 5) for _, pace in shown] for name in ("data", "compute", "communication")
    }
    with contextlib.suppress(OSError):
        append_line(directory / PACE_FILE, {"step": step, "ranks": [rank for rank, _ in shown], **figures})


@contextlib.contextmanager
def _waits_timed(waits: list[Stopwatch]) -> Iterator[None]:
    """Time what this process waits for collectives inside: where it would go on without them."""
    original = dist.Work.wait

    def timed(work: Any, *arguments: Any, **options: Any) -> Any:
        watch = Stopwatch()
        waits.append(watch)
        with watch:
            return original(work, *arguments, **options)

    dist.Work.wait = timed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        dist.Work.wait = original  # type: ignore[method-assign]
