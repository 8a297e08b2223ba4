"""The training loop. Pretraining and fine-tuning share it; each brings its own step, record and checkpoint."""

import contextlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from torch import nn

from d2v_scale.batch import Batch
from d2v_scale.checkpoint.format import MANIFEST
from d2v_scale.checkpoint.memory import MemoryCopies
from d2v_scale.checkpoint.snapshot import Contents
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.command_line import Options
from d2v_scale.data.loader import StepLoader
from d2v_scale.parallel.feed import SharedFeed
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StepResult, StudentEngine
from d2v_scale.process.doing import doing
from d2v_scale.process.profiling import StepProfiler, part
from d2v_scale.process.signals import Agreement, Stop, StopFlag, StopReason
from d2v_scale.process.watchdog import Watchdog
from d2v_scale.recipe import Recipe
from d2v_scale.run_files.committed import directory_name
from d2v_scale.running.pace import PaceKeeper
from d2v_scale.running.saving import remember, save
from d2v_scale.running.spikes import respond
from d2v_scale.tracking import RunTracker, SpeedMeter

log = logging.getLogger("d2v_scale.train")

Seen = TypeVar("Seen")


@dataclass(frozen=True)
class Taken(Generic[Seen]):
    """A step that was taken."""

    result: StepResult
    seen: Seen
    """What it leaves for the record."""
    rates: dict[str, float]
    """What it was taken with, for the record (`optim.scheduled`)."""


class AnyRun(Protocol[Seen]):
    """A run as the loop and what surrounds it see it: its parts, and what only its kind knows how to do."""

    recipe: Recipe
    options: Options
    topology: Topology
    directory: Path
    student: StudentEngine
    writer: CheckpointWriter
    copies: MemoryCopies | None
    tracker: RunTracker
    meter: SpeedMeter
    step: int
    """Steps taken, those included that were skipped because something was not finite."""
    saved: int
    """Step of the last checkpoint begun; -1: none."""

    @property
    def loader(self) -> StepLoader:
        """Where its batches come from."""

    @property
    def samples(self) -> int:
        """Samples seen by all ranks since the run began. Waits for the device."""

    def profiled(self) -> dict[str, nn.Module]:
        """Parts of the model that a profile shows by name."""

    def begin(self) -> None:
        """Get ready for the first step of this process. Collective."""

    def reload(self) -> None:
        """Go back to the newest checkpoint. Collective."""

    def take_step(self, micro_batches: list[Batch], *, logged: bool) -> Taken[Seen]:
        """Train on one step's micro-batches. `logged`: it will be recorded. Collective."""

    def record(self, taken: Taken[Seen]) -> Iterable[tuple[StopReason, str]]:
        """Record the figures of the step just taken; why the run should stop for them. Waits for the device.
        Collective."""

    def evaluate(self) -> None:
        """Measure what the recipe asks for, to the record. Collective."""

    def draw_pictures(self) -> None:
        """Have pictures drawn. Collective."""

    def contents(self) -> Contents:
        """What a checkpoint of this step holds. Collective."""


def train(run: AnyRun[Seen], stop_flag: StopFlag, agreement: Agreement, watchdog: Watchdog) -> Stop | None:
    """Train up to the last step. Returns why all ranks stop before it, None if they reached it. Collective."""
    recipe, end, began = run.recipe, last_step(run), run.step
    if run.step >= end:
        return None
    run.student.module.train()
    if run.step == 0:
        with run.meter.paused(), doing("measuring before the first step"):
            run.evaluate()
    run.begin()
    stop_flag.starting = False
    batches, pace = SharedFeed(run.loader, run.topology), PaceKeeper(run)
    profiler = StepProfiler(recipe.profile, run.directory, run.profiled(), rank=run.topology.rank)
    run.meter.restart()
    while run.step < end:
        profiler.begin(run.step + 1)
        first = run.step == began
        with _said("starting the workers that read the data", first), part("data"), run.meter.waiting("data"):
            micro_batches = next(batches)
        logged = run.tracker.due(run.step + 1, end)
        if run.student.spikes is not None:
            run.student.spikes.rule.read = ", ".join(sorted({batch.source for batch in micro_batches}))
        with _said("taking the first step, for which kernels are built", first), pace.step():
            taken = run.take_step(micro_batches, logged=logged)
        run.step += 1
        profiler.end(run.step)
        run.meter.step()
        judge(run, taken.result, stop_flag)
        if taken.result.spike is not None:
            with watchdog.allow(recipe.checkpoint.peer_timeout, "answering a spike"):
                if respond(run, taken.result.spike, stop_flag):
                    continue
        if logged:
            for reason, why in run.record(taken):
                stop_flag.up(reason, why)
        if run.step == end or _falls_on(run.step, recipe.evaluation.every):
            with run.meter.paused(), doing("measuring"):
                run.evaluate()
        plot_every = recipe.tracking.plot_every
        if (run.step == end and plot_every is not None) or _falls_on(run.step, plot_every):
            with run.meter.paused(), doing("making pictures"):
                run.draw_pictures()
        if recipe.checkpoint.due(run.step):
            with run.meter.paused("checkpoint"), doing("taking a snapshot for the checkpoint"):
                save(run)
        if run.step < end:
            remember(run, agreement)
        report_saves(run)
        run.tracker.spent(run.step, run.meter.spent)
        watchdog.beat(run.step)
        stop = agreement.agree(stop_flag.raised())
        if stop is not None:
            return stop
    return agreement.conclude()


def _said(what: str, first: bool) -> contextlib.AbstractContextManager[None]:
    """Of the first step of a process, which takes longer; of others nothing, as a thread each would cost time."""
    return doing(what) if first else contextlib.nullcontext()


def _falls_on(step: int, every: int | None) -> bool:
    """Whether a step is one of every so many; of None and 0 no step is."""
    return every is not None and every > 0 and step % every == 0


def last_step(run: AnyRun[Seen]) -> int:
    """The step this invocation ends at."""
    horizon = run.recipe.optim.max_steps
    return horizon if run.options.stop_at is None else min(horizon, run.options.stop_at)


def judge(run: AnyRun[Seen], result: StepResult, stop_flag: StopFlag) -> None:
    """Say that a step was skipped; stop the run when too many were in a row, or when too many samples are lost."""
    if not result.applied:
        if result.spike is None:
            log.warning("Step %d was skipped: a loss or gradient was not finite", run.step)
        if (skipped := run.student.skipped_in_a_row) >= run.recipe.max_skipped_in_a_row:
            reason = StopReason.NON_FINITE if result.spike is None else StopReason.SPIKE
            stop_flag.up(reason, f"{skipped} steps were skipped in a row")
    alarm = run.loader.alarm()
    if alarm is not None:
        log.error("%s", alarm)
        stop_flag.up(StopReason.DATA_STARVED, alarm)


def report_saves(run: AnyRun[Seen]) -> None:
    """Say what became of checkpoints that were written in the background."""
    for result in run.writer.poll():
        if result.error is not None:
            log.warning("Checkpoint of step %d could not be written: %s", result.step, result.error)
        else:
            run.tracker.checkpoint(run.writer.root / directory_name(result.step), MANIFEST, result.step)
