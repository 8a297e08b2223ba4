"""What surrounds the training loop: watchdog, last checkpoint, verdict, record."""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from d2v_scale import __version__, command_line
from d2v_scale.errors import EXIT_DONE
from d2v_scale.process.doing import doing
from d2v_scale.process.signals import Agreement, Stop, StopFlag, StopReason
from d2v_scale.process.status import outcome_of, write_status
from d2v_scale.process.watchdog import Watchdog
from d2v_scale.recipe import to_dict
from d2v_scale.redaction import redact
from d2v_scale.run_files.run_start import DS_CONFIG_FILE, RECIPE_FILE
from d2v_scale.running import saving, spikes
from d2v_scale.running.closing import closing, described, happened, next_commands, results
from d2v_scale.running.header import header
from d2v_scale.running.inputs import inputs
from d2v_scale.running.loop import AnyRun, last_step, report_saves, train
from d2v_scale.tracking import SystemMonitor, environment_tags, write_environment
from d2v_scale.tracking.account import account_table, read_account, told, totals
from d2v_scale.tracking.record import read_records
from d2v_scale.tracking.verdict import verdict

log = logging.getLogger("d2v_scale.train")


def supervise(run: AnyRun[Any], stop_flag: StopFlag) -> int:
    """Train under the watchdog, save, write status.json and close the record; returns the exit code. Collective."""
    recipe, topology = run.recipe, run.topology
    spikes.prepare(run)
    saving.prepare(run)
    head = _open_record(run)
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
            committed = _save_last(run, stop)
            if run.copies is not None:
                run.copies.wait()  # a peer that has closed takes no shard, or would take it where nothing is to stay
            agreement.barrier()
            if run.copies is not None:
                starved = stop is not None and stop.reason == StopReason.DATA_STARVED
                run.copies.close(keep=not committed or starved)
        if run.tracker.timeline is not None:
            run.tracker.timeline.ends(run.meter.spent)
        reason = completed(run, began) if stop is None else f"{stop}, at step {run.step} of {recipe.optim.max_steps}"
        details, lost_by_rank = zip(*agreement.gather((stop_flag.detail, run.loader.faults())), strict=True)
        if stop is not None and details[stop.rank]:
            reason = f"{reason}: {details[stop.rank]}"
        if topology.rank == 0:
            report_losses(run, lost_by_rank)
        run.loader.close()
        code = EXIT_DONE if stop is None else stop.exit_code
        if not committed:
            reason, code = f"{reason}, but the last checkpoint could not be written", code or 1
        if topology.rank == 0:
            said = _close_record(run, code, reason, head)
        if not committed:
            # A launcher takes code 1 for a crash, and would end rank 0 before it has said all.
            with watchdog.allow(recipe.checkpoint.peer_timeout, "rank 0's last words"):
                agreement.barrier()
    if topology.rank == 0:
        for line in [*said, *closing(run.directory, code, ends=run.step >= recipe.optim.max_steps)]:
            log.info("%s", line)
    return code


def _open_record(run: AnyRun[Any]) -> list[str]:
    """Say what begins, at the terminal and to MLflow; returns what was said."""
    recipe, topology = run.recipe, run.topology
    head = header(run)
    for line in head:
        log.info("%s", line)
    run.tracker.start(
        to_dict(recipe),
        {
            **environment_tags(),
            **command_line.changed_from_named(recipe),
            **topology.tags(),
            "zero_stage": run.student.stage,
        },
        stems=recipe.data.observed(),
        resume_step=run.step if run.step > 0 or run.saved >= 0 else None,
        total_steps=last_step(run),
    )
    run.tracker.artifact(run.directory / RECIPE_FILE)
    run.tracker.artifact(run.directory / DS_CONFIG_FILE)
    if topology.rank == 0:
        run.tracker.artifact(write_environment(run.directory))
        run.tracker.describe(described([], head))
        run.tracker.inputs(inputs(run))
    return head


def _save_last(run: AnyRun[Any], stop: Stop | None) -> bool:
    """Write the last step's checkpoint if there is none, and wait for what is being written; whether that is there.
    Collective."""
    with run.meter.paused("checkpoint"), doing("writing the last checkpoint"):
        if (stop is None or stop.reason < StopReason.DATA_STARVED) and run.saved != run.step:
            saving.save(run)
        committed = run.writer.finish()
    report_saves(run)
    return committed


def _close_record(run: AnyRun[Any], code: int, reason: str, head: list[str]) -> list[str]:
    """Write status.json and close the record; how the run ended, in lines. Rank 0."""
    recipe, is_task = run.recipe, run.recipe.task is not None
    records, attempts = read_records(run.directory), read_account(run.directory)
    run.tracker.log(run.step, run.samples, {f"spent/{kind}": s for kind, s in totals(attempts).items()})
    judged = verdict(records, recipe.objective.health)
    said = happened(code, reason, records, judged, is_task=is_task) + told(attempts)
    ends = run.step >= recipe.optim.max_steps
    # Before MLflow is waited for: whoever asked this run to stop may not leave it that time.
    write_status(
        run.directory,
        code,
        reason,
        run.step,
        judged,
        result=results(records, is_task=is_task),
        next_commands=next_commands(run.directory, code, ends=ends),
    )
    run.tracker.describe(described([*said, account_table(attempts)], head))
    run.tracker.finish(outcome_of(code), said[0], judged)
    return said


def completed(run: AnyRun[Any], began: int) -> str:
    """In words, what an invocation did that started after step `began` and was not stopped."""
    horizon = run.recipe.optim.max_steps
    if began >= horizon:
        return f"all {horizon} steps were done before"
    if run.step == began:
        return f"nothing to do: already at step {began} of {horizon} (--stop_at {run.options.stop_at})"
    return (
        f"all {horizon} steps done" if run.step >= horizon else f"stopped at step {run.step} of {horizon} (--stop_at)"
    )


def report_losses(run: AnyRun[Any], by_rank: Iterable[Mapping[str, int]]) -> None:
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


def facts(run: AnyRun[Any]) -> dict[str, Any]:
    """What every checkpoint says of its run beside weights and moments. Collective."""
    return {
        "samples": run.samples,
        "data": run.loader.state_dict(),
        "recipe": json.loads(json.dumps(to_dict(run.recipe))),
        "tokenizer_sha256": run.loader.tokenizer_sha256(),
        "mlflow_run_id": run.tracker.run_id(),
        "version": __version__,
        "spikes": None if run.student.spikes is None else run.student.spikes.rule.state_dict(),
    }
