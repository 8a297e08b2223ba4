"""What the faults of a long run cost, with and without restarts inside the job: a published trace, replayed.

    python tools/goodput.py --trace llama3 --ranks 16384

Every cost is an option. Their defaults, with where they come from:

- --notice: a process that ends is seen at once, and 2 s later all are gone (`local_ranks.RESTART_GRACE_S`).
- --notice_requeue: the same through a job's script; 26 s until a killed rank's run goes on, measured on two CPUs.
- --hang_limit: when the watchdog speaks; a recipe's default is 1800 s, 120 s was measured in kill tests.
- --queue: 121 s, how long Slurm 24 holds a requeued job (measured); --node_queue: the same, for a lost node.
- --start_up: 180 s, of which 30 s are the groups of more than 10,000 GPUs (MegaScale, arXiv:2402.15627, section 3.5);
  imports, weights and kernels are an assumption.
- --checkpoint_stall: 5 s, an assumption; --checkpoint_every: the best interval for it.
- --memory_every, --memory_stall: copies in memory every 60 s, each of which holds training up for 0.1 s, assumptions;
  --disk_every: beside them a checkpoint an hour.
- --spare: 40 s beside --notice until a spare node takes a lost one's place: so long a launcher says nothing before it
  counts as lost (`agents.agent.LOST_S`).
"""

import argparse
import itertools
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from d2v_scale.planning.goodput import TRACES, Costs, Fault, best_interval, replay, table
from d2v_scale.tracking.account import read_account
from d2v_scale.tracking.record import read_records

_FAULTS: tuple[Fault, ...] = ("process", "node", "hang", "silent", "planned")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", choices=TRACES, default="llama3")
    parser.add_argument("--ranks", type=int, default=16384)
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="RUN",
        help="take --start_up, --notice, --spare and what copies in memory cost from it",
    )
    for name, seconds in (
        ("notice", 2.0),
        ("notice_requeue", 26.0),
        ("hang_limit", 1800.0),
        ("short_hang_limit", 120.0),
        ("queue", 121.0),
        ("node_queue", 121.0),
        ("spare", 40.0),
        ("start_up", 180.0),
        ("checkpoint_stall", 5.0),
        ("checkpoint_every", 0.0),
        ("memory_every", 60.0),
        ("memory_stall", 0.1),
        ("disk_every", 3600.0),
    ):
        parser.add_argument(f"--{name}", type=float, default=seconds, metavar="SECONDS")
    return parser


def ways(options: argparse.Namespace, every: float) -> list[tuple[str, Costs]]:
    """Today's way, then what changes, one thing after the other."""
    # Who is still requeued is also noticed as in a requeue: by Slurm and the job's script.
    at_once = dict.fromkeys(_FAULTS, 0.0)
    requeued: dict[Fault, float] = {**dict.fromkeys(_FAULTS, options.queue), "node": options.node_queue}
    slow: dict[Fault, float] = {**dict.fromkeys(_FAULTS, options.notice_requeue), "hang": options.hang_limit}
    short: dict[Fault, float] = {**slow, "hang": options.short_hang_limit}
    fast: dict[Fault, float] = {**dict.fromkeys(_FAULTS, options.notice), "hang": options.short_hang_limit}
    in_job: dict[Fault, float] = {**fast, "node": options.notice_requeue, "planned": options.notice_requeue}
    with_spares: dict[Fault, float] = {**fast, "planned": options.notice_requeue}
    save = {"checkpoint_every": every, "checkpoint_stall": options.checkpoint_stall, "start_up": options.start_up}
    stall = options.memory_stall + options.checkpoint_stall * options.memory_every / options.disk_every
    memory = {**save, "checkpoint_every": options.memory_every, "checkpoint_stall": stall}
    restarted: dict[Fault, float] = {**at_once, "node": options.node_queue, "planned": options.queue}
    spared: dict[Fault, float] = {**restarted, "node": options.spare}
    return [
        ("requeue, the watchdog's default limit", Costs(notice=slow, queue=requeued, **save)),
        ("requeue, a short limit", Costs(notice=short, queue=requeued, **save)),
        ("restarts inside the job", Costs(notice=in_job, queue=restarted, **save)),
        ("and spare nodes", Costs(notice=with_spares, queue=spared, **save)),
        ("and state in a peer's memory", Costs(notice=with_spares, queue=spared, **memory)),
    ]


def measure(options: argparse.Namespace) -> str | None:
    """Enter what a run's attempts took, and its copies in memory if it has any, the median of them; why that cannot be
    done, or None."""
    attempts = read_account(options.measured)
    pairs = itertools.pairwise(attempts)
    restarted = [(before, one) for before, one in pairs if one.seconds["restart"] > 0]
    takes_place = [len(one.excluded) > len(before.excluded) for before, one in restarted]
    spared, others = (
        [one.seconds["restart"] for (_, one), takes in zip(restarted, takes_place, strict=True) if takes == wanted]
        for wanted in (True, False)
    )
    if not restarted:
        return f"{options.measured} holds no attempt that was restarted after a fault"
    options.start_up = statistics.median(one.seconds["start_up"] for one in attempts)
    if others:
        options.notice = statistics.median(others)
    if spared:  # noticing included
        options.spare = max(0.0, statistics.median(spared) - options.notice)
    copies = [record for record in read_records(options.measured) if "memory_copy_stall_seconds" in record]
    if len(copies) > 1:
        options.memory_stall = statistics.median(one["memory_copy_stall_seconds"] for one in copies)
        apart = (after["time"] - before["time"] for before, after in itertools.pairwise(copies))
        options.memory_every = statistics.median(apart)
    return None


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 2 for what means nothing."""
    options = make_parser().parse_args(arguments)
    if options.ranks < 1 or min(value for value in vars(options).values() if isinstance(value, float)) < 0:
        print("error: --ranks must be 1 or more, and no time may be below 0.", file=sys.stderr)
        return 2
    if options.measured is not None and (problem := measure(options)) is not None:
        print(f"error: {problem}.", file=sys.stderr)
        return 2
    trace = TRACES[options.trace]
    best = best_interval(trace, options.checkpoint_stall, options.ranks)
    every = options.checkpoint_every or best
    if not every or not options.memory_every or not options.disk_every:
        print("error: without --checkpoint_stall no interval is best; give --checkpoint_every.", file=sys.stderr)
        return 2
    found = [(name, replay(trace, costs, options.ranks)) for name, costs in ways(options, every)]
    print(f"{trace.source}.")
    interruptions, wall = found[0][1].interruptions, found[0][1].wall
    print(f"{options.ranks} ranks, {trace.days:g} days: {interruptions:.0f} interruptions, one in ", end="")
    print(f"{wall / interruptions / 3600:.1f} h; a checkpoint every {every:.0f} s.\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
