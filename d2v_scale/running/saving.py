"""When the state of a run is saved: to its directory, and to the memory of its nodes (`checkpoint.memory`)."""

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_scale.checkpoint.memory import MemoryCopies
from d2v_scale.checkpoint.snapshot import Contents
from d2v_scale.errors import ConfigError
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.process.signals import Agreement
from d2v_scale.recipe import Recipe, binding_differences, to_dict
from d2v_scale.running.spikes import count_rewinds

if TYPE_CHECKING:
    from d2v_scale.running.loop import AnyRun

log = logging.getLogger("d2v_scale.train")

_OF_A_TENSOR, _OF_A_FILE = 512, 1 << 16
"""Bytes of names and shapes, with room to spare."""


def open_copies(recipe: Recipe, student: StudentEngine, topology: Topology, directory: Path) -> MemoryCopies | None:
    """The run's copies in memory; None where the recipe wants none. Collective: all ranks must call. Raises
    ConfigError."""
    config = recipe.checkpoint.memory
    if not config.every:
        return None
    branch = count_rewinds(directory) if topology.rank == 0 else 0
    return MemoryCopies.create(config, directory / "checkpoints", digest(recipe, student.stage, topology), branch)


def digest(recipe: Recipe, stage: int, topology: Topology) -> str:
    """Of what must be the same for a shard to fit: what makes another experiment, and who has which part."""
    values = to_dict(recipe)
    binding = {name: value for name, (_, value) in binding_differences(_emptied(values), values).items()}
    return hashlib.sha256(json.dumps([binding, topology.tags(), stage]).encode()).hexdigest()


def _emptied(values: Any) -> Any:
    """The same sections, without a value in any of them."""
    if isinstance(values, dict):
        return {name: _emptied(value) for name, value in values.items()}
    return [_emptied(value) for value in values] if isinstance(values, list | tuple) else None


def prepare(run: "AnyRun[Any]") -> None:
    """See whether copies have room, and say where they go. A run that begins is refused without it; one that goes on
    does so without copies. Collective: all ranks must call. Raises ConfigError."""
    if run.copies is None:
        return
    pieces = run.contents().pieces
    shard = sum(4 * piece.values.numel() + _OF_A_TENSOR for piece in pieces) + _OF_A_FILE
    lack = run.copies.lack_of_room(shard)
    if not lack:
        if run.topology.rank == 0:
            log.info("Copies of %s", run.copies.describe())
        return
    if run.step == 0:
        raise ConfigError(
            "checkpoint.memory.every",
            f"is {run.recipe.checkpoint.memory.every}, but {lack}",
            "Enlarge it (mount -o remount,size=...), name another in checkpoint.memory.dir, or set every to 0.",
        )
    log.warning("The run goes on without copies in memory: %s", lack)
    run.copies.close(keep=False)
    run.copies = None


def remember(run: "AnyRun[Any]", agreement: Agreement) -> None:
    """Begin a copy of this step, if one is due; the loop waits for the snapshot only. Collective: all ranks must
    call."""
    copies = run.copies
    if copies is None or not copies.config.due(run.step):
        return
    began = time.monotonic()
    with run.meter.paused("checkpoint"):
        if not copies.may_begin(run.step, agreement.least):
            return
        contents = run.contents()
        extra = contents.extra | {"lately": run.loader.lately(run.recipe.optim.spikes.leave_out)}
        copies.save(run.step, contents.pieces, contents.state, extra)
    figures = {"memory_copy_stall_seconds": time.monotonic() - began, "memory_copies_lost": copies.lost}
    run.tracker.log(run.step, run.samples, figures)


def save(run: "AnyRun[Any]") -> None:
    """Begin a checkpoint of this step; the loop waits for the snapshot only. Collective: all ranks must call."""
    run.tracker.flush()
    contents: Contents = run.contents()
    stall = run.writer.save(run.step, contents.pieces, contents.state, contents.extra)
    run.tracker.log(run.step, run.samples, {"checkpoint_stall_seconds": stall})
    run.saved = run.step
