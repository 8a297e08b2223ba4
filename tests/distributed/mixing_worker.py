"""One rank: models of several stems trained through the real step, their sources mixed (`mixing_worker.py CASES.json`).

A case: name, model, mixing, steps, out, and maybe tensor, pipeline, stage, zero (more of the JSON's
`zero_optimization`), load. Each ends in a checkpoint that also holds loss and gradient norm of every step.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_mixtures
import torch.distributed as dist
from rank_cases import run_cases

from d2v_scale.batch import Batch
from d2v_scale.checkpoint import Checkpoint, training
from d2v_scale.checkpoint.config import CheckpointConfig
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.data2vec.config import EmaConfig
from d2v_scale.networks.draw import Draw
from d2v_scale.optim import OptimConfig, set_rates
from d2v_scale.parallel import ds_config, groups
from d2v_scale.parallel.feed import SharedFeed
from d2v_scale.pretraining.breakdown import LossBreakdown
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import collapse_statistics, train_step
from d2v_scale.recipe import Recipe

SAMPLES = 8
SHARES = 4
"""Micro-batches of a source in a step over all replicas, the same in every topology."""


def recipe_of(case: dict, replicas: int) -> Recipe:
    name = case["model"]
    objective = tiny_mixtures.objective(name)
    objective.ema = EmaConfig(start=0.9, end=0.9)
    sources = len(tiny_mixtures.STEMS[name]) if case["mixing"] == "together" else 1
    return Recipe(
        model=tiny_mixtures.model(name),
        objective=objective,
        optim=OptimConfig(lr=1e-3, schedule="constant", max_steps=100, eps=1e-4, clip=0.05),
        parallel=groups.ParallelConfig(tensor=case.get("tensor", 1), pipeline=case.get("pipeline", 1)),
        accumulation=sources * SHARES // replicas,
    )


def micro_batches(case: dict, step: int, topology: groups.Topology) -> list[Batch]:
    """As the loader gives them: the sources of the step in turn."""
    name, stems = case["model"], len(tiny_mixtures.STEMS[case["model"]])
    rounds = SHARES // topology.data_parallel_size
    own = slice(topology.data_parallel_rank * rounds, (topology.data_parallel_rank + 1) * rounds)
    # A source that lost all its samples in a step would be blank: see the tests of the step.
    read = range(stems) if case["mixing"] == "together" else [step * 2 % 3 % stems]
    parts = [tiny_mixtures.parts(name, number, SAMPLES, SHARES, seed=step)[own] for number in read]
    return [part[turn].to(topology.device) for turn in range(rounds) for part in parts]


def run(case: dict, topology: groups.Topology) -> None:
    recipe = recipe_of(case, topology.data_parallel_size)
    numbers = ds_config.RecipeNumbers(
        precision="fp32",
        accumulation=recipe.accumulation,
        clip=recipe.optim.clip,
        stems=len(recipe.model.modalities),
    )
    raw = {"zero_optimization": {"stage": case.get("stage", 1), **case.get("zero", {})}}
    config = ds_config.resolve(raw, numbers, recipe.parallel, topology.world_size)
    student, teacher = build_engines(recipe, config, topology)
    if "load" in case:
        training.restore(Checkpoint.open(case["load"]), student, teacher)
    student.module.train()
    first, last = case["steps"]
    steps = (micro_batches(case, step, topology) for step in range(first, last))
    reads = topology.model_size == 1 or dist.get_rank(topology.model_group) == 0
    feed = SharedFeed(steps if reads else iter(()), topology)
    weights = tiny_mixtures.weights(case["model"]) if case["mixing"] == "together" else {}
    sources = list(tiny_mixtures.weights(case["model"]))
    figures: list[dict[str, float]] = []
    for step in range(first, last):
        set_rates(student.optimizer, recipe.optim, student.completed_updates)
        breakdown = LossBreakdown(sources, topology.device)
        result, seen = train_step(
            student,
            teacher,
            next(feed),
            recipe.objective,
            Draw(1, step),
            observe=True,
            weights=weights,
            breakdown=breakdown,
        )
        assert result.applied
        measured = {**collapse_statistics(seen, topology), **breakdown.figures(topology)}
        figures.append({name: float(value) for name, value in measured.items()} | {"norm": result.grad_norm})
    writer = CheckpointWriter.create(Path(case["out"]), CheckpointConfig(peer_timeout=30))
    writer.save(last, training.pieces(student, teacher), training.state(student, teacher), {"figures": figures})
    assert writer.finish(), writer.poll()
    teacher.destroy()
    student.destroy()


if __name__ == "__main__":
    run_cases(run)
