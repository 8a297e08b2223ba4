"""One rank: recipes of several stems, or with dropped blocks, through the real step (`absent_worker.py CASES.json`).

A case: name, recipe (arguments of train.py), zero (the JSON's `zero_optimization`), steps, out, and maybe `load`, or
`together`: the micro-batches of a step are of different sources.
Each ends in a checkpoint that also holds the loss and gradient norm of every step, and the sources read.
"""

import json
import sys
from pathlib import Path

from rank_cases import ending_together, take_down_groups

from d2v_scale import command_line
from d2v_scale.batch import Batch
from d2v_scale.checkpoint import Checkpoint, training
from d2v_scale.checkpoint.config import CheckpointConfig
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.data.loader import StepLoader
from d2v_scale.networks.draw import Draw
from d2v_scale.optim import set_rates
from d2v_scale.parallel import groups
from d2v_scale.planning import legal
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import collapse_statistics, train_step
from d2v_scale.recipe import Recipe

LOADED: dict[tuple, list[list[Batch]]] = {}
"""Micro-batches by what they depend on: many cases read the same."""


def batches_of(recipe: Recipe, topology: groups.Topology, last: int) -> list[list[Batch]]:
    key = (topology.data_parallel_rank, topology.data_parallel_size, recipe.accumulation, recipe.global_batch_size)
    found = LOADED.setdefault((*key, len(recipe.data.sources)), [])
    if len(found) < last:
        loader = StepLoader(
            recipe.data,
            recipe.model,
            recipe.objective.masking,
            recipe.objective.compat,
            seed=recipe.seed,
            global_batch_size=recipe.global_batch_size,
            batch_unit=recipe.batch_unit,
            accumulation=recipe.accumulation,
            dp_rank=topology.data_parallel_rank,
            dp_size=topology.data_parallel_size,
            device=topology.device,
        )
        found[:] = [next(loader) for _ in range(last)]
        loader.close()
    return found


def run(case: dict, topology: groups.Topology, recipe: Recipe) -> None:
    config = legal.deepspeed_config(recipe, {"zero_optimization": case["zero"]}, topology.world_size, auto="fp32")
    student, teacher = build_engines(recipe, config, topology)
    if "load" in case:
        training.restore(Checkpoint.open(case["load"]), student, teacher)
    student.module.train()
    first, last = case["steps"]
    losses, norms, sources = [], [], []
    steps = batches_of(recipe, topology, last)
    if case.get("together"):
        steps = [[steps[(step + micro) % last][micro] for micro in range(recipe.accumulation)] for step in range(last)]
    for step in range(first, last):
        micro_batches = steps[step]
        set_rates(student.optimizer, recipe.optim, student.completed_updates)
        result, seen = train_step(
            student, teacher, micro_batches, recipe.objective, Draw(recipe.seed, step), observe=True
        )
        assert result.applied
        losses.append(float(collapse_statistics(seen, topology)["loss"]))
        norms.append(result.grad_norm)
        sources.append(micro_batches[0].source)
    writer = CheckpointWriter.create(Path(case["out"]), CheckpointConfig(peer_timeout=30))
    extra = {"losses": losses, "norms": norms, "sources": sources}
    writer.save(last, training.pieces(student, teacher), training.state(student, teacher), extra)
    assert writer.finish(), writer.poll()
    teacher.destroy()
    student.destroy()


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    topology = groups.initialize(groups.ParallelConfig())
    held = groups.ParallelConfig()
    for case in cases:
        with ending_together(case, topology):
            recipe, _ = command_line.parse(case["recipe"])
            if recipe.parallel != held:
                # Other groups in the same processes: a launch costs more than a case.
                take_down_groups()
                topology = groups._divide(recipe.parallel, topology.device)
                held = recipe.parallel
                LOADED.clear()
            run(case, topology, recipe)
    groups.shutdown()


if __name__ == "__main__":
    main()
