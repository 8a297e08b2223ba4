"""What surrounds a training loop, whatever it trains: watchdog, last checkpoint, verdict, record."""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from d2v_scale import __version__, command_line
from d2v_scale.checkpoint.format import MANIFEST
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.command_line import Options
from d2v_scale.committed import directory_name
from d2v_scale.data.loader import StepLoader
from d2v_scale.errors import EXIT_DONE
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StepResult, StudentEngine
from d2v_scale.recipe import Recipe, to_dict
from d2v_scale.redaction import redact
from d2v_scale.run_start import DS_CONFIG_FILE, RECIPE_FILE
from d2v_scale.signals import Agreement, Stop, StopFlag, StopReason
from d2v_scale.status import outcome_of, write_status
from d2v_scale.tracking import RunTracker, SystemMonitor, environment_tags, write_environment
from d2v_scale.watchdog import Watchdog

log = logging.getLogger("d2v_scale.train")


class AnyRun(Protocol):
    """What pretraining and fine-tuning runs have in common."""

    recipe: Recipe
    options: Options
    topology: Topology
    directory: Path
    student: StudentEngine
    writer: CheckpointWriter
    tracker: RunTracker
    step: int
    saved: int

    @property
    def loader(self) -> StepLoader:
        """Where its batches come from."""

    @property
    def samples(self) -> int:
        """Samples seen by all ranks since the run began. Waits for the device."""


def supervise(run: AnyRun, stop_flag: StopFlag, train: Callable[..., Stop | None], save: Callable[..., None]) -> int:
    """Train under the watchdog, save, write status.json and close the record; returns the exit code. Collective."""
    recipe, topology = run.recipe, run.topology
    run.tracker.start(
        to_dict(recipe),
        {
            **environment_tags(),
            **command_line.changed_from_named(recipe),
            **topology.tags(),
            "zero_stage": run.student.stage,
        },
        resume_step=run.step if run.saved >= 0 else None,
        total_steps=last_step(run),
    )
    run.tracker.artifact(run.directory / RECIPE_FILE)
    run.tracker.artifact(run.directory / DS_CONFIG_FILE)
    if topology.rank == 0:
        run.tracker.artifact(write_environment(run.directory))
    agreement = Agreement()
    limit_s = recipe.hang_limit_minutes * 60
    nodes = SystemMonitor(run.directory) if topology.local_rank == 0 else contextlib.nullcontext()
    with (
        run.tracker,
        nodes,
        Watchdog(run.directory, rank=topology.rank, world_size=topology.world_size, limit_s=limit_s) as watchdog,
    ):
        began = run.step
        stop = train(run, stop_flag, agreement, watchdog)
        with watchdog.allow(recipe.checkpoint.peer_timeout, "last checkpoint"):
            if (stop is None or stop.reason < StopReason.DATA_STARVED) and run.saved != run.step:
                save(run)
            committed = run.writer.finish()
            report_saves(run)
            agreement.barrier()
        reason, code = (completed(run, began), EXIT_DONE) if stop is None else (str(stop), stop.exit_code)
        details, lost_by_rank = zip(*agreement.gather((stop_flag.detail, run.loader.faults())), strict=True)
        if stop is not None and details[stop.rank]:
            reason = f"{reason}: {details[stop.rank]}"
        if topology.rank == 0:
            report_losses(run, lost_by_rank)
        run.loader.close()
        if not committed:
            reason, code = f"{reason}, but the last checkpoint could not be written", code or 1
        # Before MLflow is waited for: whoever asked this run to stop may not leave it that time.
        if topology.rank == 0:
            write_status(run.directory, code, reason, run.step)
        run.tracker.finish(outcome_of(code))
    return code


def last_step(run: AnyRun) -> int:
    """The step this invocation ends at."""
    horizon = run.recipe.optim.max_steps
    return horizon if run.options.stop_at is None else min(horizon, run.options.stop_at)


def completed(run: AnyRun, began: int) -> str:
    """In words, what an invocation did that started after step `began` and reached its last step."""
    if run.step > began or began >= run.recipe.optim.max_steps:
        return "all steps done"
    reason = f"already at step {began}, --stop_at {run.options.stop_at} leaves nothing to do"
    log.warning("%s", reason)
    return reason


def report_saves(run: AnyRun) -> None:
    """Say what became of checkpoints that were written in the background."""
    for result in run.writer.poll():
        if result.error is not None:
            log.warning("Checkpoint of step %d could not be written: %s", result.step, result.error)
        else:
            run.tracker.checkpoint(run.writer.root / directory_name(result.step), MANIFEST, result.step)


def report_losses(run: AnyRun, by_rank: Iterable[Mapping[str, int]]) -> None:
    """Write how many samples of each shard this invocation lost, to lost_samples.json and MLflow. Rank 0."""
    lost: Counter[str] = Counter()
    for of_rank in by_rank:
        for shard, samples in of_rank.items():
            lost[redact(shard)] += samples
    if lost:
        path = run.directory / "lost_samples.json"
        try:
            path.write_text(json.dumps(dict(lost.most_common()), indent=1) + "\n")
            run.tracker.artifact(path)
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)
        log.warning("%d samples were lost, most in %s: see %s", lost.total(), lost.most_common(1)[0][0], path)


def judge(run: AnyRun, result: StepResult, stop_flag: StopFlag) -> None:
    """Say that a step was skipped; stop the run when too many were in a row, or when too many samples are lost."""
    if not result.applied:
        log.warning("Step %d was skipped: a loss or gradient was not finite", run.step)
        if run.student.skipped_in_a_row >= run.recipe.max_skipped_in_a_row:
            stop_flag.up(StopReason.NON_FINITE, f"{run.student.skipped_in_a_row} steps were skipped in a row")
    alarm = run.loader.alarm()
    if alarm is not None:
        log.error("%s", alarm)
        stop_flag.up(StopReason.DATA_STARVED, alarm)


def facts(run: AnyRun) -> dict[str, Any]:
    """What every checkpoint says of its run beside weights and moments. Collective."""
    return {
        "samples": run.samples,
        "data": run.loader.state_dict(),
        "recipe": json.loads(json.dumps(to_dict(run.recipe))),
        "tokenizer_sha256": run.loader.tokenizer_sha256(),
        "mlflow_run_id": run.tracker.run_id(),
        "version": __version__,
    }
