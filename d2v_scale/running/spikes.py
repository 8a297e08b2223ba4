"""What a run does about a spike: skip it, go back and leave its samples out, or end. All of it is in spikes.jsonl.

A line has `time`, `step`, `norm` and `limit`, `answer`, and of a rewind `rewound_to` and what is `left_out`: by source
the positions in its planned order, which are the same at any number of ranks, as `data.leave_out` takes them.
"""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from d2v_scale.data.config import LeaveOut
from d2v_scale.data.streaming import StreamedSource
from d2v_scale.errors import ConfigError
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


def respond(run: "AnyRun[Any]", spike: Spike, stop_flag: StopFlag) -> bool:
    """Answer a spike, which has changed nothing so far, as the recipe says. Returns whether the run went back to an
    earlier step. The same on every rank; collective: all ranks must call."""
    config, step = run.recipe.optim.spikes, run.step
    earlier, _ = _recorded(run)
    rewinds = config.on_spike == "rewind"
    told: dict[str, Any] = {"step": step, "norm": spike.norm, "limit": spike.limit}
    if config.on_spike == "stop":
        stop_flag.up(StopReason.SPIKE, f"step {step} is {spike}")
        told["answer"] = "stop"
    elif len(earlier) >= config.most:
        many = f"{len(earlier)} of the last {COUNTED_STEPS} steps were spikes (optim.spikes.most)"
        stop_flag.up(StopReason.SPIKE, f"{many}, and step {step} is {spike}")
        told["answer"] = "stop"
    elif rewinds and run.writer.finish() and run.saved >= 0:
        told |= {"answer": "rewind"} | _rewind(run)
    else:
        told["answer"] = "skip"
    if run.topology.rank == 0:
        append_line(run.directory / SPIKES_FILE, {"time": time.time(), **told})
        run.tracker.artifact(run.directory / SPIKES_FILE)
    what = {
        "stop": "the run ends",
        "skip": "it is skipped" + (", as there is no checkpoint to go back to" if rewinds else ""),
        "rewind": f"the run goes back to step {told.get('rewound_to')}, without {_named(told.get('left_out', []))}",
    }
    log.warning("Step %d is %s: %s", step, spike, what[told["answer"]])
    return bool(told["answer"] == "rewind")


def _rewind(run: "AnyRun[Any]") -> dict[str, Any]:
    """Go back to the newest checkpoint, and read on without what the last steps have read."""
    read = _from_rank_0(run.topology, run.loader.read_lately(run.recipe.optim.spikes.leave_out))
    run.loader.take_counts()  # of steps that are taken back
    run.reload()
    # Of what lies before the checkpoint the run keeps what it learned.
    sources = run.loader.state_dict()["sources"]
    places = {name: [one["epoch"], one["window"], one["offset"]] for name, one in sources.items()}
    left_out = [one for one in read if one.end > places[one.source]]
    for one in left_out:
        one.begin = max(one.begin, places[one.source])
        run.loader.leaving_out.add(one)
    run.tracker.rewound(run.step, run.meter.spent)
    run.begin()
    run.meter.restart()
    return {"rewound_to": run.step, "left_out": [asdict(one) for one in left_out]}


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
