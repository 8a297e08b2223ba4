"""One of two ranks, each a node: the real program's run, taken back in its process to what memory holds of it.

    memory_run_worker.py NODE_MEMORY [ARGUMENTS]

Rank 0's memory is emptied before, so that its shard comes from the other.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from d2v_scale import command_line
from d2v_scale.checkpoint.memory import HeldCheckpoint, newest_anywhere
from d2v_scale.checkpoint.training import pieces
from d2v_scale.parallel import groups
from d2v_scale.pretraining import program
from d2v_scale.process.signals import Agreement, StopFlag
from d2v_scale.process.watchdog import Watchdog
from d2v_scale.running import loop, run_directory
from d2v_scale.running.saving import open_copies
from d2v_scale.train import configure


def to_the_end(run: program.Run) -> tuple[list[tuple[int, float]], list[torch.Tensor]]:
    """Losses by step, and all that a checkpoint would hold at the end."""
    losses: list[tuple[int, float]] = []
    log = run.tracker.log

    def note(step: int, samples: int, values: dict[str, Any]) -> None:
        losses.extend([(step, values["loss"])] if "loss" in values else [])
        log(step, samples, values)

    run.tracker.log = note  # type: ignore[method-assign,assignment]
    with Watchdog(run.directory, rank=run.topology.rank, world_size=2, limit_s=600) as watchdog:
        assert loop.train(run, StopFlag(), Agreement(), watchdog) is None
    run.tracker.log = log  # type: ignore[method-assign]
    return losses, [piece.values.clone() for piece in pieces(run.student, run.teacher)]


if __name__ == "__main__":
    memory = Path(sys.argv[1]) / os.environ["RANK"]
    os.environ["NODE_MEMORY"] = str(memory)
    recipe, options = command_line.parse(sys.argv[2:])
    config = configure(recipe)
    topology = groups.initialize(recipe.parallel)
    directory = run_directory.claim(recipe, options, config, topology)
    run = program.build(recipe, options, config, topology, directory)
    assert run.copies is not None
    begin = run.copies.save

    def save(*contents: Any) -> None:
        """On a busy machine the next copy might be due before this one is whole, and be left out."""
        assert run.copies is not None
        begin(*contents)
        run.copies.wait()

    run.copies.save = save  # type: ignore[method-assign]
    losses, values = to_the_end(run)
    assert run.copies.lost == 0
    Agreement().barrier()
    run.copies.close(keep=True)
    if topology.rank == 0:
        shutil.rmtree(memory)
    run.copies = open_copies(recipe, run.student, topology, directory)
    checkpoint, on_disk = newest_anywhere(run.writer.root, run.copies)
    assert isinstance(checkpoint, HeldCheckpoint)
    assert (checkpoint.step, on_disk) == (4, -1)
    run.teacher.wait()
    program.load(run, checkpoint)
    assert run.step == 4
    again, same = to_the_end(run)
    if topology.rank == 0:
        assert again == losses[4:], (again, losses)
    assert all(torch.equal(one, other) for one, other in zip(values, same, strict=True))
    groups.shutdown()
    print("the same", flush=True)
