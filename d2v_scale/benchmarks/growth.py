"""How step time and memory grow with depth, width, length, clones and world size, as ratios to the smallest.

A small 2.0 text model at ZeRO-1, fp32, one thread a rank. Rounds alternate between the sizes; the fastest counts.
Memory is counted: weights, gradients, moments and teacher on the rank, and what the forward pass keeps for backward.
`exponent`: slope of the log of the ratio over the log of the size; what exceeds theory by more than the tolerance is
named. Over ranks, weak (as many samples on each) and strong (as many together), theory is the time of the same work on
this machine's cores; more ranks than cores share them.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.benchmarks import cases
from d2v_scale.benchmarks.cases import Case
from d2v_scale.benchmarks.planned_steps import on_ranks
from d2v_scale.benchmarks.sides import Ours
from d2v_scale.parallel import groups
from d2v_scale.parallel.groups import Topology

_ZERO = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000_000}}
_WIDE = 0.15
"""What an exponent may exceed theory by."""
_SLOW = 1.5
"""How many times the theoretical time a step over several ranks may take: launches and collectives of a small model."""
_WORLDS = (1, 2, 4)
_SIZES = {
    "depth": "blocks",
    "width": "channels",
    "length": "tokens of a sample",
    "clones": "masked clones of a sample",
    "weak": "ranks, each with as much work",
    "strong": "ranks, together with as much work",
}
"""What the horizontal axis of each panel counts."""


@dataclass(frozen=True)
class Sweep:
    """One size that varies, and the largest exponents that the work allows."""

    name: str
    sizes: tuple[int, ...]
    time: float
    memory: float


# Attention is quadratic in length, linears in width; the embedding and what is only there once flatten all of them.
SWEEPS = (
    Sweep("depth", (2, 4, 8), 1, 1),
    Sweep("width", (64, 128, 256), 2, 2),
    Sweep("length", (64, 128, 256), 2, 2),
    Sweep("clones", (1, 2, 4, 8), 1, 1),
)


@dataclass(frozen=True)
class Point:
    """What one size costs."""

    size: int
    seconds: float
    held_bytes: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py growth`."""
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("growth.png"), help="the plot")
    names = [sweep.name for sweep in SWEEPS]
    parser.add_argument("--sweeps", nargs="*", default=names, choices=names, help="which of the sizes")
    parser.add_argument("--worlds", nargs="*", type=int, default=_WORLDS, help="numbers of ranks, 1 first; none: skip")


def run(options: argparse.Namespace) -> int:
    """Print a table a size and draw all of them."""
    torch.set_num_threads(1)
    topology = groups.single_process()
    torch.set_num_threads(1)
    curves: dict[str, list[Point]] = {}
    for sweep in SWEEPS:
        if sweep.name in options.sweeps:
            these = [_case(sweep.name, size) for size in sweep.sizes]
            points = curves[sweep.name] = measure(these, sweep.sizes, topology, options.rounds)
            for what, allowed in (("seconds", sweep.time), ("held_bytes", sweep.memory)):
                print(describe(sweep.name, what, points, allowed), flush=True)
    groups.shutdown()
    cores = len(os.sched_getaffinity(0))
    for name in ("weak", "strong") if options.worlds else ():
        curves[name] = [_over_ranks(name, world, options.rounds) for world in options.worlds]
        print(describe_ranks(name, curves[name], cores), flush=True)
    if curves:
        draw(curves, options.out)
        print(f"plot: {options.out}")
    return 0


def _case(name: str, size: int, samples: int = 2) -> Case:
    sizes = {"depth": 2, "width": 64, "length": 64, "clones": 2, name: size}
    keys = {
        "model.backbone.depth": sizes["depth"],
        "objective.target.top_k_layers": 2,
        "model.backbone.width": sizes["width"],
        "model.backbone.heads": 4,
        "model.backbone.ffn": 4 * sizes["width"],
        "model.predictor.width": sizes["width"],
        "model.backbone.prenet_depth": 0,
        "model.text.vocab_size": 1000,
        "model.text.mask_id": 999,
        "objective.masking.clones": sizes["clones"],
    }
    options = tuple(f"--{key}={value}" for key, value in keys.items())
    return cases.case("d2v2_text_base", samples, sizes["length"], options)


def measure(these: Sequence[Case], sizes: Sequence[int], topology: Topology, rounds: int) -> list[Point]:
    """Time and memory of each case, in turns. Collective: all ranks must call."""
    sides = [Ours(case, topology, deepspeed=_ZERO) for case in these]
    batches = [case.batch(topology.data_parallel_rank).to(topology.device) for case in these]
    held = [held_bytes(side, batch) for side, batch in zip(sides, batches, strict=True)]
    best = [math.inf] * len(sides)
    for number in range(1, rounds + 1):
        for index, (side, batch) in enumerate(zip(sides, batches, strict=True)):
            begin = time.perf_counter()
            side.step(batch, number)
            best[index] = min(best[index], time.perf_counter() - begin)
    for side in sides:
        side.close()
    return [Point(*row) for row in zip(sizes, best, held, strict=True)]


def held_bytes(side: Ours, batch: Batch) -> int:
    """Bytes of weights, gradients, moments and teacher on this rank, and of what one step keeps for its backward pass.

    Runs that step. Collective: all ranks must call.
    """
    storages: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    own = {p.untyped_storage().data_ptr() for p in side.student.module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        side.step(batch, 0)
    activations = sum(size for pointer, size in storages.items() if pointer not in own)
    weights_and_gradients = sum(8 * p.numel() for p in side.student.module.parameters())
    # fp32 master and two moments; at ZeRO-1 in fp32 the master is a copy.
    optimizer = sum(12 * shard.numel for shard in side.student.shards())
    teacher = sum(4 * shard.numel for shard in side.teacher.shards())
    return activations + weights_and_gradients + optimizer + teacher


def exponent(points: Sequence[Point], what: str) -> float:
    """Least-squares slope of log(cost) over log(size)."""
    x = [math.log(point.size) for point in points]
    y = [math.log(getattr(point, what)) for point in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def describe(name: str, what: str, points: Sequence[Point], allowed: float) -> str:
    """One row: ratios to the smallest size, the exponent, and whether it exceeds `allowed`."""
    first = getattr(points[0], what)
    ratios = "  ".join(f"{point.size}: {getattr(point, what) / first:5.2f}" for point in points)
    found = exponent(points, what)
    verdict = "GROWS FASTER THAN THEORY" if found > allowed + _WIDE else "ok"
    label = "time" if what == "seconds" else "memory"
    return f"{name:7s} {label:6s} {ratios}  exponent {found:.2f} (theory at most {allowed:g})  {verdict}"


def ideal_time(name: str, world: int, cores: int) -> float:
    """Time over that of one rank, if communication were free: ranks beyond `cores` wait for each other."""
    return max(1.0, world / cores) if name == "weak" else 1 / min(world, cores)


def describe_ranks(name: str, points: Sequence[Point], cores: int) -> str:
    """One row over world sizes: time and memory over those of one rank, and whether time exceeds theory."""
    cells, slow = [], []
    for point in points:
        ratio, ideal = point.seconds / points[0].seconds, ideal_time(name, point.size, cores)
        memory = point.held_bytes / points[0].held_bytes
        shared = ", cores shared" if point.size > cores else ""
        cells.append(f"{point.size}: time {ratio:.2f} (ideal {ideal:.2f}{shared}) memory {memory:.2f}")
        if ratio > _SLOW * ideal:
            slow.append(str(point.size))
    verdict = f"SLOWER THAN {_SLOW:g} x THEORY at {', '.join(slow)} ranks" if slow else "ok"
    return f"{name:7s} {'  '.join(cells)}  {verdict}"


def _over_ranks(name: str, world: int, rounds: int) -> Point:
    samples = 4 if name == "weak" else max(1, 4 // world)
    found = on_ranks(world, "d2v_scale.benchmarks.growth", str(samples), str(rounds))
    return Point(world, found["seconds"], found["held_bytes"])


def _rank(samples: int, rounds: int) -> None:
    """One rank of `_over_ranks`: the slowest rank's time, the largest memory."""
    torch.set_num_threads(1)
    topology = groups.initialize()
    torch.set_num_threads(1)
    (point,) = measure([_case("width", 192, samples)], [topology.world_size], topology, rounds)
    worst = torch.tensor([point.seconds, point.held_bytes], dtype=torch.float64)
    torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
    if topology.rank == 0:
        print(json.dumps({"seconds": worst[0].item(), "held_bytes": worst[1].item()}), flush=True)
    groups.shutdown()


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """One panel a size: time and memory over the smallest, on logarithmic axes, beside linear growth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(curves), 3.2), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        sizes = [point.size for point in points]
        for what, label in (("seconds", "step time"), ("held_bytes", "memory")):
            values = [getattr(point, what) / getattr(points[0], what) for point in points]
            axes.plot(sizes, values, marker="o", label=label)
        axes.plot(sizes, [size / sizes[0] for size in sizes], color="0.6", linestyle=":", label="linear")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title("ranks, " + name if name in ("weak", "strong") else name)
        axes.set_xlabel(_SIZES[name])
        axes.set_ylabel(f"ratio to that at {sizes[0]}")
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]))
