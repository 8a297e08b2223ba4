"""What faults cost a long run: a published trace of interruptions, replayed through what each of them costs. Pure.

Of every second of wall time that is not lost to a fault or a checkpoint, training is assumed to be productive.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Fault = Literal["process", "node", "hang", "silent", "planned"]
"""What an interruption takes: `process`: a process ends, its node can be used again; `node`: the node is gone; `hang`:
nothing ends, nothing moves; `silent`: wrong numbers; `planned`: announced, so the run saves first."""


@dataclass(frozen=True)
class Interruption:
    """A row of a trace."""

    cause: str
    count: int
    fault: Fault


@dataclass(frozen=True)
class Trace:
    """Interruptions of a run that somebody published."""

    source: str
    days: float
    ranks: int
    rows: tuple[Interruption, ...]


LLAMA3 = Trace(
    "The Llama 3 Herd of Models (arXiv:2407.21783), section 3.3.4, table 5: 419 unexpected interruptions, 47 planned",
    54.0,
    16384,
    (
        Interruption("faulty GPU", 148, "node"),
        Interruption("GPU HBM3 memory", 72, "node"),
        Interruption("software bug", 54, "process"),
        Interruption("network switch or cable", 35, "hang"),
        Interruption("unplanned host maintenance", 32, "node"),
        Interruption("GPU SRAM memory", 19, "node"),
        Interruption("GPU system processor", 17, "node"),
        Interruption("NIC", 7, "hang"),
        Interruption("NCCL watchdog timeout", 7, "hang"),
        Interruption("silent data corruption", 6, "silent"),
        Interruption("GPU thermal interface and sensor", 6, "node"),
        Interruption("SSD", 3, "node"),
        Interruption("power supply", 3, "node"),
        Interruption("server chassis", 2, "node"),
        Interruption("IO expansion board", 2, "node"),
        Interruption("dependency", 2, "process"),
        Interruption("CPU", 2, "node"),
        Interruption("system memory", 2, "node"),
        Interruption("planned", 47, "planned"),
    ),
)
TRACES = {"llama3": LLAMA3}


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds that things take, all of them inputs."""

    notice: Mapping[Fault, float]
    """From a fault to the end of all processes."""
    queue: Mapping[Fault, float]
    """From there until new processes are started."""
    start_up: float
    """From the first process to the first step: imports, groups, weights, kernels."""
    checkpoint_every: float
    """Between two checkpoints."""
    checkpoint_stall: float
    """That training is held up by each."""
    rewind: float = 0.0
    """Of training that silent corruption takes back beside the last checkpoint's."""

    def of(self, fault: Fault) -> dict[str, float]:
        """What one fault costs, by what the account of a run calls it."""
        # A checkpoint is, on average, half an interval old; before what is planned the run saves.
        repeated = 0.0 if fault == "planned" else self.checkpoint_every / 2
        repeated += self.rewind if fault == "silent" else 0.0
        return {
            "notice": self.notice[fault],
            "queue": self.queue[fault],
            "start_up": self.start_up,
            "repeated": repeated,
        }


@dataclass(frozen=True)
class Replayed:
    """A trace under some costs."""

    wall: float
    """Seconds."""
    interruptions: float
    lost: dict[str, float]
    """Seconds by what they went into: notice, queue, start_up, repeated, checkpoint."""

    @property
    def goodput(self) -> float:
        """Share of the wall time that is productive; 0 where faults come faster than they are survived."""
        return max(0.0, 1 - sum(self.lost.values()) / self.wall)


def replay(trace: Trace, costs: Costs, ranks: int) -> Replayed:
    """The trace on `ranks` ranks: faults come in proportion to them."""
    wall, scale = trace.days * 86400, ranks / trace.ranks
    lost = dict.fromkeys(("notice", "queue", "start_up", "repeated"), 0.0)
    for row in trace.rows:
        for name, seconds in costs.of(row.fault).items():
            lost[name] += scale * row.count * seconds
    lost["checkpoint"] = wall / costs.checkpoint_every * costs.checkpoint_stall
    return Replayed(wall, scale * sum(row.count for row in trace.rows), lost)


def best_interval(trace: Trace, stall: float, ranks: int) -> float:
    """Seconds between checkpoints that cost least (Young 1974): repeated work against stalls."""
    faults = sum(row.count for row in trace.rows if row.fault != "planned") * ranks / trace.ranks
    return math.sqrt(2 * stall * trace.days * 86400 / faults)


def table(rows: Sequence[tuple[str, Replayed]]) -> str:
    """The ways beside each other, in hours; the first one is what the others are compared with."""
    first = sum(rows[0][1].lost.values())
    names = list(rows[0][1].lost)
    head = ["", "goodput", *(f"{name.replace('_', '-')}, h" for name in names), "of the first's lost seconds gone"]
    lines = [head, ["---"] * len(head)]
    for name, found in rows:
        gone = 1 - sum(found.lost.values()) / first
        lines.append([name, f"{found.goodput:.2%}", *(f"{found.lost[k] / 3600:.1f}" for k in names), f"{gone:.0%}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
