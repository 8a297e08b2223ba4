"""What the parts of a step cost on this machine, measured for plans (`d2v plan --calibrate`).

One rank steps small text models, in turns, that differ in one thing each: blocks, micro-batches, width, rows of the
embedding. The differences are what a block, a micro-batch and an element of the optimizer cost. Then as many ranks as
the node is planned with, at once: products beside each other, collectives, and a pipeline's micro-batches.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.benchmarks.planned_steps import Work, fastest, on_ranks, wait
from d2v_scale.errors import ConfigError, UserError
from d2v_scale.parallel import groups, launchers
from d2v_scale.parallel.config import ParallelConfig
from d2v_scale.parallel.groups import Topology
from d2v_scale.planning import calibration, legal
from d2v_scale.planning.calibration import Calibration
from d2v_scale.planning.costs import ADAM_BYTES, EMA_BYTES, Costs, Host, Rate, Ring, assumed
from d2v_scale.planning.flops import cost_of
from d2v_scale.planning.hardware import Hardware
from d2v_scale.recipe import Precision

_SHALLOW, _DEEP, _MICRO, _ROWS = 2, 6, 4, 40_000
"""Blocks, micro-batches and rows of an embedding between which differences are taken."""
_WIDTHS = {"cpu": (64, 192, 512), "cuda": (256, 1024, 2048)}
_SIZES: dict[str, dict[str, Any]] = {"cpu": {"length": 64, "samples": 4}, "cuda": {"length": 512, "samples": 16}}
"""Of the models whose products are measured."""
_LARGE = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Elements that are gathered to measure a bandwidth."""
_REPEATED = 20
ROUNDS = 12
"""Steps of each model, of which the fastest counts."""

Found = dict[str, Any]


def calibrate(ranks: int, alike: Hardware, rounds: int = ROUNDS, precision: Precision = "auto") -> Calibration:
    """Measure this machine with so many ranks at once. `alike`: a device with published peaks, whose figures are taken
    for what one node cannot show, the network; `precision`: of the products, `auto` what it is on this kind of device
    where nothing is measured. Raises ConfigError for more ranks than there are devices, or cores."""
    most, kind = os.cpu_count() or 1, "cores"
    if torch.cuda.is_available():
        most, kind = torch.cuda.device_count(), "devices"
    if ranks > most:
        raise ConfigError("gpus", f"are {ranks}, and this machine has {most} {kind}", f"Measure with 1 to {most}.")
    alone = on_ranks(1, __name__, str(rounds), precision)
    others = on_ranks(ranks, __name__, str(rounds), precision) if ranks > 1 else {}
    costs = costs_of(alone, others, assumed(alike, 0.4), alike.name)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Calibration(machine=calibration.machine(), date=date, ranks=ranks, costs=costs)


def costs_of(alone: Found, others: Found, taken: Costs, name: str) -> Costs:
    """Costs of what `_alone` and `_together` found. `taken`: what is not measured, of the device `name`. Raises
    UserError where more work took less time."""
    pairs = [(each[0], more) for each in alone["tiny"].values() for more in each[1:]]
    if any(more <= less for less, more in [*pairs, *(one["seconds"] for one in alone["products"])]):
        raise UserError("This machine is busy: a larger model was stepped in less time.", "Measure while it is idle.")
    hosts = {stage: _host(alone["tiny"][stage], alone["rows"]) for stage in ("1", "3")}
    host, waits = hosts["1"], alone["device"] == "cpu"
    blocks, rest = [], []
    for one in alone["products"]:
        shallow, deep = one["seconds"]
        per_element = (ADAM_BYTES + EMA_BYTES) / host.update_rate
        block = (deep - shallow) / (_DEEP - _SHALLOW)
        seconds = block - one["block_elements"] * per_element - (host.layer if waits else 0.0)
        blocks.append(one["block_flops"] / max(seconds, 0.1 * block))
        left = shallow - _SHALLOW * block - host.step - one["other_elements"] * per_element
        left -= host.micro if waits else 0.0
        rest.append(one["other_flops"] / max(left, 0.1 * shallow))
    widths = tuple(one["width"] for one in alone["products"])
    ring = taken.ring
    measured = {}
    if others:
        start, link_step = _fitted(others["latencies"])
        ring = Ring(start=start, link_step=link_step, network_step=max(link_step, taken.ring.network_step))
        measured = {"crowded": max(1.0, others["crowded"]), "link": others["link"]}
        if others["micro"]:
            # Of a stage with one block.
            beyond = others["micro"] - host.layer - host.micro / 2
            measured["hop"] = max(beyond / 2, start + link_step)
    said = f"measured on this machine; the network as assumed for {name}" + ("" if others else ", links, too")
    return dataclasses.replace(
        taken,
        source=said,
        precision=alone["precision"],
        blocks=Rate(widths=widths, flops=tuple(blocks)),
        others=Rate(widths=widths, flops=tuple(rest)),
        zero_1=hosts["1"],
        zero_3=hosts["3"],
        ring=ring,
        waits=waits,
        **measured,
    )


def _host(seconds: Sequence[float], elements: int) -> Host:
    """Of one engine: from a tiny step, one with more blocks, one with more micro-batches, one with more elements."""
    tiny, deep, micro, rows = seconds
    layer = (deep - tiny) / (_DEEP - _SHALLOW)
    each = max((micro - tiny) / (_MICRO - 1) - _SHALLOW * layer, 0.0)
    return Host(
        step=max(tiny - each - _SHALLOW * layer, 0.0),
        micro=each,
        layer=layer,
        update_rate=(ADAM_BYTES + EMA_BYTES) * elements / (rows - tiny),
    )


def _fitted(latencies: Sequence[Sequence[float]]) -> tuple[float, float]:
    """What a collective costs, and each of its steps: from (steps, seconds)."""
    steps, seconds = np.array(latencies).T
    step, start = np.polyfit(steps, seconds, 1)
    if step <= 0 or start < 0:
        step, start = (0.0, float(seconds.mean())) if step <= 0 else (float((seconds / steps).mean()), 0.0)
    return float(start), float(step)


def _alone(rounds: int, precision: Precision) -> Found:
    """One rank: what its host and its products take."""
    topology = groups.initialize()
    torch.set_num_threads(1)
    kind = topology.device.type
    tiny = [
        each
        for stage in (1, 3)
        for base in [Work(stage=stage, depth=_SHALLOW, precision=precision)]
        for each in (
            base,
            dataclasses.replace(base, depth=_DEEP),
            dataclasses.replace(base, accumulation=_MICRO),
            dataclasses.replace(base, vocabulary=base.vocabulary + _ROWS),
        )
    ]
    sizes = {**_SIZES[kind], "precision": precision}
    large = [Work(width=width, depth=depth, **sizes) for width in _WIDTHS[kind] for depth in (_SHALLOW, _DEEP)]
    times = fastest(tiny, topology, rounds)
    slow = fastest(large, topology, max(3, rounds // 3))
    found = {
        "device": kind,
        "precision": large[0].planned(1).resolved_precision(legal.usual_precision(kind)),
        "tiny": {"1": times[:4], "3": times[4:]},
        "rows": _ROWS * tiny[0].width,
        "products": [{**_sizes(work), "seconds": slow[k : k + 2]} for k, work in enumerate(large) if k % 2 == 0],
    }
    groups.shutdown()
    return found


def _sizes(work: Work) -> Found:
    """FLOPs of a step of some work, of a block and of all else; elements of its optimizer likewise."""
    cost = cost_of(work.planned(1), "text")
    blocks = [one.total for one in cost.layers if one.layer.kind == "block"]
    width = work.width
    decoder = 5 * 9 * width**2 + 4 * width**2  # five convolutions of nine taps, two layers of a projection
    return {
        "width": width,
        "block_flops": work.samples * blocks[0],
        "other_flops": work.samples * (cost.total - sum(blocks)),
        "block_elements": 12 * width**2,
        "other_elements": work.vocabulary * width + decoder,
    }


def _together(rounds: int, precision: Precision) -> Found:
    """All ranks: how they slow each other, and what passes between them. Collective: all ranks must call."""
    world = launchers.world_size()
    topology = groups.initialize(ParallelConfig(pipeline=1 if world % 2 else 2))
    torch.set_num_threads(1)
    device = topology.device
    x, large = torch.zeros(1, device=device), torch.zeros(_LARGE[device.type] // world, device=device)
    latencies = []
    for size in sorted({2, world}):
        group = dist.new_group(list(range(size)))
        if topology.rank >= size:
            dist.barrier()
            continue
        out = torch.zeros(size, device=device)
        gather, reduce = _gather(out, x, group), _reduce(x, group)
        latencies += [(size - 1, _repeated(gather, device)), (2 * (size - 1), _repeated(reduce, device))]
        if size < world:
            dist.barrier()
    whole = torch.zeros(large.numel() * world, device=device)
    seconds = _repeated(_gather(whole, large, None), device, 5) - min(latency for _, latency in latencies)
    crowded = _crowded(topology, rounds)
    micro = 0.0
    if topology.pipeline_size > 1:
        few, many = (Work(pipeline=2, accumulation=count, precision=precision) for count in (2, 2 + _MICRO))
        times = fastest([few, many], topology, rounds)
        micro = (times[1] - times[0]) / _MICRO
    sent = (world - 1) / world * whole.nbytes
    found = {"latencies": latencies, "link": sent / max(seconds, 1e-9), "crowded": crowded, "micro": micro}
    groups.shutdown()
    return found


def _gather(out: Tensor, x: Tensor, group: Any) -> Callable[[], object]:
    return lambda: dist.all_gather_into_tensor(out, x, group=group)


def _reduce(x: Tensor, group: Any) -> Callable[[], object]:
    return lambda: dist.all_reduce(x, group=group)


def _repeated(call: Callable[[], object], device: torch.device, times: int = _REPEATED) -> float:
    """Seconds of one of some calls in a row, the median of five rounds after one."""
    rounds = []
    for _ in range(6):
        begin = time.perf_counter()
        for _ in range(times):
            call()
        wait(device)
        rounds.append((time.perf_counter() - begin) / times)
    return statistics.median(rounds[1:])


def _crowded(topology: Topology, rounds: int) -> float:
    """Times as long that products and a pass over memory take while all ranks do them. Collective: all must call."""
    device = topology.device
    x, memory = torch.randn(512, 512, device=device), torch.zeros(_LARGE[device.type], device=device)

    def work() -> None:
        for _ in range(4):
            torch.nn.functional.gelu(x @ x)
        memory.lerp_(memory, 0.5)

    ratios = []
    for _ in range(max(3, rounds // 3)):
        each = []
        for busy in (topology.rank == 0, True):
            dist.barrier()
            each.append(_repeated(work, device, 1) if busy else 0.0)
        ratios.append(each[1] / each[0] if each[0] else 0.0)
    return statistics.median(ratios)


def main(rounds: int, precision: Precision) -> None:
    """One rank of `calibrate`."""
    alone = launchers.world_size() == 1
    found = (_alone if alone else _together)(rounds, precision)
    if os.environ["RANK"] == "0":
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), cast(Precision, sys.argv[2]))
