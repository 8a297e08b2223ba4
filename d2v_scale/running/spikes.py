"""What a run does about a spike: skip it, go back and leave its samples out, or end. All of it is in spikes.jsonl.

A line has `time`, `step`, `norm` and `loss`, `of` (which of them was above `limit`), `answer`, what the spike and the
steps before it have `read`, and of a rewind `rewound_to` and what is `left_out`: by source the positions in its planned
order, which are the same at any number of ranks, as `data.leave_out` takes them.
"""

import contextlib
import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from d2v_scale.checkpoint.find import find_newest_valid
from d2v_scale.checkpoint.reader import Checkpoint
from d2v_scale.data.config import LeaveOut
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.files import append_line
from d2v_scale.parallel.groups import Topology
from d2v_scale.process.signals import StopFlag, StopReason
from d2v_scale.spikes import Spike
from d2v_scale.tracking.events import SPIKES_FILE

if TYPE_CHECKING:
    from d2v_scale.running.loop import AnyRun

log = logging.getLogger("d2v_scale.train")

COUNTED_STEPS = 1000
"""Within which `optim.spikes.most` counts."""


def prepare(run: "AnyRun[Any]") -> None:
    """Leave out what earlier rewinds of the run left out. Collective: all ranks must call. Raises ConfigError where a
    rewind could not name what it leaves out."""
    if run.recipe.optim.spikes.on_spike == "rewind":
        for source in run.loader.sources:
            if isinstance(source, StreamedSource):
                raise ConfigError(
                    "optim.spikes.on_spike",
                    f"is rewind, but {source.name} has no index, without which no range of it has a name",
                    "Make one with `d2v index`, or choose skip or stop.",
                )
    _, ranges = _recorded(run)
    for one in ranges:
        run.loader.leaving_out.add(one)


def count_rewinds(directory: Path) -> int:
    """How often the run there went back."""
    return sum(line["answer"] == "rewind" for line in _read(directory))


def respond(run: "AnyRun[Any]", spike: Spike, stop_flag: StopFlag) -> bool:
    """Answer a spike, which has changed nothing so far, as the recipe says. Returns whether the run went back to an
    earlier step. The same on every rank; collective: all ranks must call."""
    config, step = run.recipe.optim.spikes, run.step
    earlier, _ = _recorded(run)
    read = [LeaveOut(**one) for one in _from_rank_0(run.topology, _latest(run))]
    told: dict[str, Any] = {"step": step, "norm": spike.norm, "loss": spike.loss, "of": spike.of, "limit": spike.limit}
    told["read"] = [asdict(one) for one in read]
    if config.on_spike == "stop":
        stop_flag.up(StopReason.SPIKE, f"step {step} is {spike}")
        what = _answer(run, told, "stop")
    elif len(earlier) >= config.most:
        many = f"{len(earlier)} of the last {COUNTED_STEPS} steps were spikes (optim.spikes.most)"
        stop_flag.up(StopReason.SPIKE, f"{many}, and step {step} is {spike}")
        what = _answer(run, told, "stop")
    elif config.on_spike == "rewind":
        what = _rewind(run, read, told)
    else:
        what = _answer(run, told, "skip")
    if run.topology.rank == 0:
        run.tracker.artifact(run.directory / SPIKES_FILE)
    log.warning("Step %d is %s: %s", step, spike, what)
    return bool(told["answer"] == "rewind")


def _latest(run: "AnyRun[Any]") -> list[dict[str, Any]]:
    """What the latest steps have read, of sources that have positions."""
    streams = {source.name for source in run.loader.sources if isinstance(source, StreamedSource)}
    read = run.loader.read_lately(run.recipe.optim.spikes.leave_out)
    return [asdict(one) for one in read if one.source not in streams]


def _answer(run: "AnyRun[Any]", told: dict[str, Any], answer: str) -> str:
    """Note an answer that needs no line to be right: a full disk ends no run. Returns it in words."""
    told["answer"] = answer
    if run.topology.rank == 0:
        _append(run.directory, told)
    return {"stop": "the run ends", "skip": "it is skipped"}[answer]


def _append(directory: Path, told: dict[str, Any]) -> str:
    """Add a line to spikes.jsonl; why it takes none, in words, empty if it did."""
    try:
        append_line(directory / SPIKES_FILE, {"time": time.time(), **told})
    except OSError as error:
        log.warning("%s takes no lines: %s", directory / SPIKES_FILE, error)
        return f"{SPIKES_FILE} takes no lines ({error})"
    return ""


def _rewind(run: "AnyRun[Any]", read: list[LeaveOut], told: dict[str, Any]) -> str:
    """Go back to the newest checkpoint, and go on without what was `read` behind it; skip where there is none, or where
    what is left out cannot be noted. Returns what is done in words."""
    run.tracker.rewinds(run.step, run.meter.spent)
    run.writer.finish()  # if it failed there are older ones
    checkpoint = _newest(run)
    if checkpoint is None:
        return f"{_answer(run, told, 'skip')}, as there is no checkpoint to go back to"
    # Of what lies before the checkpoint the run keeps what it learned.
    sources = checkpoint.extra["data"]["sources"]
    places = {name: [one["epoch"], one["window"], one["offset"]] for name, one in sources.items()}
    left_out = [one for one in read if one.end > places[one.source]]
    for one in left_out:
        one.begin = max(one.begin, places[one.source])
    # Noted before anything changes: a process that comes later must leave out the same.
    line = told | {"answer": "rewind", "rewound_to": checkpoint.step, "left_out": [asdict(one) for one in left_out]}
    trouble = _from_rank_0(run.topology, _append(run.directory, line) if run.topology.rank == 0 else "")
    if trouble:
        told["answer"] = "skip"
        return f"it is skipped, as {trouble}"
    told |= line
    if run.copies is not None:
        run.copies.go_back()
    run.loader.take_counts()  # of steps that are taken back
    run.reload()
    for one in left_out:
        run.loader.leaving_out.add(one)
    run.tracker.rewound(run.step)
    run.begin()
    run.meter.restart()
    return f"the run goes back to step {run.step}, without {_named(line['left_out'])}"


def _newest(run: "AnyRun[Any]") -> Checkpoint | None:
    """The checkpoint that the run would go back to; None: there is none. Collective: all ranks must call."""
    with contextlib.suppress(CheckpointError):  # all that are there are damaged
        return find_newest_valid(run.directory / "checkpoints", together=True)[0]
    return None


def _recorded(run: "AnyRun[Any]") -> tuple[list[str], list[LeaveOut]]:
    """Of spikes.jsonl, as rank 0 reads it: spikes of the latest steps, and all ranges that are left out."""
    lines = _from_rank_0(run.topology, _read(run.directory) if run.topology.rank == 0 else [])
    recent = {
        # A step that was done again after a fault is told twice.
        json.dumps([line["step"], line.get("left_out")])
        for line in lines
        if run.step - COUNTED_STEPS < line["step"] <= run.step + COUNTED_STEPS and line["answer"] != "stop"
    }
    return sorted(recent), [LeaveOut(**one) for line in lines for one in line.get("left_out", [])]


def _read(directory: Path) -> list[dict[str, Any]]:
    """The whole lines of spikes.jsonl."""
    path = directory / SPIKES_FILE
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:  # torn by a crash, and the spike comes again
            continue
    return found


def _named(left_out: list[dict[str, Any]]) -> str:
    """Ranges in words."""
    ranges = [f"{one['begin']} to {one['end']} of {one['source']}" for one in left_out]
    return f"the samples from {', '.join(ranges)}" if ranges else "anything new to leave out"


def _from_rank_0(topology: Topology, mine: Any) -> Any:
    said = [mine]
    if topology.world_size > 1:
        dist.broadcast_object_list(said, src=0)
    return said[0]
