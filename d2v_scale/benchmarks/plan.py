"""A calibrated plan against measured steps: 12 ways to train small models, of which none was calibrated with.

The machine must be idle. Three recipes are trained in four ways each, on one rank or two; a launch for each division of
the ranks, its ways in turns, and the launches in turns, too. Of every pair of ways the ratio of estimated step times is
compared with the measured ratio; of pairs that share a recipe and differ by more than 15 %, the faster one must have
been named.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from d2v_scale.benchmarks import calibrate
from d2v_scale.benchmarks.planned_steps import Work, fastest, on_ranks
from d2v_scale.errors import UserError
from d2v_scale.parallel import groups
from d2v_scale.planning import calibration, hardware
from d2v_scale.planning.costs import Costs
from d2v_scale.planning.job import Job, ModelSizes
from d2v_scale.planning.step_time import step_time


def _like(base: Work, **more: Any) -> Work:
    return dataclasses.replace(base, **more)


FURTHER = 0.15
"""Two ways that differ by more must be put in order."""
MEDIAN = 0.2
"""What the median ratio may be off."""

_TEXT = Work(recipe="d2v2_text_base", width=256, depth=5, length=96)
_IMAGES = Work(recipe="d2v2_vision_base", width=128, depth=6, length=224)
_OLDER = Work(recipe="d2v1_text_base", width=384, depth=4, length=128)
POINTS: dict[str, tuple[int, Work]] = {
    name: (ranks, _like(base, **more))
    for name, ranks, base, more in (
        ("text, 1 rank", 1, _TEXT, {"samples": 4}),
        ("text, ZeRO-1", 2, _TEXT, {"samples": 2}),
        ("text, ZeRO-3, 2 micro-batches", 2, _TEXT, {"samples": 1, "accumulation": 2, "stage": 3}),
        ("text, tensor", 2, _TEXT, {"samples": 4, "tensor": 2}),
        ("images, 1 rank", 1, _IMAGES, {"samples": 4}),
        ("images, 1 rank, recomputed, 4 micro-batches", 1, _IMAGES, {"accumulation": 4, "checkpointing": True}),
        ("images, ZeRO-2", 2, _IMAGES, {"samples": 2, "stage": 2}),
        ("images, pipeline", 2, _IMAGES, {"accumulation": 4, "pipeline": 2}),
        ("older text, 1 rank, ZeRO-3", 1, _OLDER, {"samples": 8, "stage": 3}),
        ("older text, ZeRO-1, 4 micro-batches", 2, _OLDER, {"samples": 1, "accumulation": 4}),
        ("older text, tensor, recomputed", 2, _OLDER, {"samples": 8, "tensor": 2, "checkpointing": True}),
        ("older text, pipeline", 2, _OLDER, {"samples": 4, "accumulation": 2, "pipeline": 2}),
    )
}
"""Name -> ranks, and the work. Ways of one recipe have the same samples in a step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py plan`."""
    parser.add_argument("--rounds", type=int, default=3, help="times that every launch takes its turn")
    parser.add_argument(
        "--steps", type=int, default=5, help="steps of each way in a launch, of which the fastest counts"
    )
    parser.add_argument("--calibration", type=Path, help="read it instead of measuring first")
    parser.add_argument("--points", nargs="*", help="of these ways only")


def run(options: argparse.Namespace) -> int:
    """Print a row a way, and the verdict."""
    names = options.points or list(POINTS)
    if unknown := [name for name in names if name not in POINTS]:
        raise UserError(f"There is no way {unknown[0]!r}.", f"There are: {'; '.join(POINTS)}.")
    if options.calibration is not None:
        found = calibration.read(options.calibration)
    else:
        found = calibrate.calibrate(2, hardware.H100)
    seconds = measure(names, options.rounds, options.steps)
    groups.single_process()
    estimates = {name: estimate(*POINTS[name], found.costs) for name in names}
    print("\n".join(compared(estimates, seconds)))
    return 0


def estimate(ranks: int, work: Work, costs: Costs) -> float:
    """Seconds of a step, planned. A world of one must be formed."""
    recipe = work.planned(ranks)
    sizes = ModelSizes.of(recipe)
    job = Job.of(recipe, work.deepspeed, ranks, sizes, auto=costs.precision)
    device = calibration.this_device(ranks, hardware.H100)
    [step] = job.steps
    return step_time(job, step, device, ranks, costs).total


def measure(names: list[str], rounds: int, steps: int) -> dict[str, float]:
    """Seconds of the fastest step of each way, the median of the rounds."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for launch in launches(names).values():
            ranks, _ = POINTS[launch[0]]
            answer = on_ranks(ranks, __name__, str(steps), *launch)
            for name in launch:
                found[name].append(answer[name])
    return {name: statistics.median(each) for name, each in found.items()}


def launches(names: list[str]) -> dict[tuple[int, int, int], list[str]]:
    """Ways that one launch can measure: of the same ranks, divided alike."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for name in names:
        ranks, work = POINTS[name]
        found.setdefault((ranks, work.tensor, work.pipeline), []).append(name)
    return found


def compared(estimates: Mapping[str, float], seconds: Mapping[str, float]) -> Iterator[str]:
    """The rows, and what all pairs say."""
    first = next(iter(seconds))
    for name in seconds:
        a, b = estimates[name] / estimates[first], seconds[name] / seconds[first]
        yield f"{name:44s} estimated {a:6.2f}  measured {b:6.2f}  of the first   {a / b:5.2f}x"
    errors, right, wrong = [], 0, []
    for one, other in itertools.combinations(seconds, 2):
        planned, ratio = estimates[one] / estimates[other], seconds[one] / seconds[other]
        errors.append(max(planned / ratio, ratio / planned) - 1)
        if POINTS[one][1].recipe == POINTS[other][1].recipe and max(ratio, 1 / ratio) > 1 + FURTHER:
            if (planned > 1) == (ratio > 1):
                right += 1
            else:
                wrong.append(f"{one} against {other}: {planned:.2f} estimated, {ratio:.2f} measured")
    off = statistics.median(errors)
    yield f"ratios of {len(errors)} pairs: median error {off:.0%}, largest {max(errors):.0%} (aim: {MEDIAN:.0%})"
    pairs = f"{right + len(wrong)} pairs of one recipe that differ by more than {FURTHER:.0%}"
    yield f"the faster one named in {right} of {pairs}"
    yield from wrong


def _rank(steps: int, names: list[str]) -> None:
    """One rank of a launch: the slowest rank's times."""
    works = [POINTS[name][1] for name in names]
    topology = groups.initialize(works[0].parallel)
    torch.set_num_threads(1)
    worst = torch.tensor(fastest(works, topology, steps), dtype=torch.float64, device=topology.device)
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    found: dict[str, Any] = dict(zip(names, worst.tolist(), strict=True))
    groups.shutdown()
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), sys.argv[2:])
