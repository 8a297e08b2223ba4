"""What strikes a job in tests/slurm/soak.py: each fault waits for nothing but its own doing."""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster import wait_until
from jobs import ENDED, Job, Workplace

_SLOW_S = 6.0
"""For which a slow node does nothing; the watchdog's limit is far above it."""
_FULL_BYTES = 1 << 20
"""A file of a full disk grows no further: records fit in, files of a checkpoint do not."""

Strike = Callable[[Job, Workplace, random.Random], None]


@dataclass(frozen=True)
class Fault:
    """Something that happens to a job."""

    strike: Strike
    restarts: bool = True
    """Whether an attempt ends by it. What only slows the run, or a checkpoint that fails, ends none."""


def training(job: Job) -> list[str]:
    """Nodes whose ranks train, in their order; a spare one is none."""
    newest = max(job.run_dir.glob("logs/*/meet/plan-*.json"), key=lambda path: path.stat().st_mtime)
    return list(json.loads(newest.read_text())["active"])


def ranks(job: Job) -> list[int]:
    """Process ids of the ranks, of which there is at least one."""
    wait_until(lambda: bool(job.pids("train.py")), 120, f"no rank is there\n{job.story()}")
    return job.pids("train.py")


def usr1(job: Job, _place: Workplace, _draw: random.Random) -> None:
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)


def usr1_to_one_rank(job: Job, _place: Workplace, draw: random.Random) -> None:
    os.kill(draw.choice(ranks(job)), signal.SIGUSR1)


def killed_rank(job: Job, _place: Workplace, draw: random.Random) -> None:
    os.kill(draw.choice(ranks(job)), signal.SIGKILL)


def two_killed(job: Job, _place: Workplace, _draw: random.Random) -> None:
    for pid in ranks(job):
        os.kill(pid, signal.SIGKILL)


def killed_again(job: Job, place: Workplace, draw: random.Random) -> None:
    """A rank, and one of those that were started after it."""
    before = ranks(job)
    killed_rank(job, place, draw)
    wait_until(lambda: bool({*job.pids("train.py")} - {*before}), 120, f"no rank is started again\n{job.story()}")
    time.sleep(draw.uniform(0, 3))
    os.kill(draw.choice([pid for pid in ranks(job) if pid not in before]), signal.SIGKILL)


def stopped_rank(job: Job, _place: Workplace, draw: random.Random) -> None:
    os.kill(draw.choice(ranks(job)), signal.SIGSTOP)


def slow_node(job: Job, _place: Workplace, draw: random.Random) -> None:
    """Stands still for some seconds, and goes on."""
    pid = draw.choice(ranks(job))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(_SLOW_S)
    os.kill(pid, signal.SIGCONT)


def killed_launcher(job: Job, _place: Workplace, draw: random.Random) -> None:
    """With its ranks: the node seems gone to all others."""
    os.kill(job.launchers()[draw.choice(training(job))], signal.SIGKILL)


def node_down(job: Job, _place: Workplace, draw: random.Random) -> None:
    """Not the first one, on which the job's script runs."""
    node = draw.choice([name for name in training(job) if name != job.cluster.nodes[0]])
    job.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=soak")
    time.sleep(5)
    job.cluster.revive(node)


def preemption(job: Job, place: Workplace, _draw: random.Random) -> None:
    options = (f"--nodes={len(job.cluster.nodes)}", "--exclusive", "--parsable", "--output=/dev/null")
    urgent = place.cluster.run("sbatch", "--partition=urgent", *options, "--wrap=sleep 1").strip()
    wait_until(lambda: place.cluster.state(urgent) in ENDED, 120, "the urgent job does not end")


def full_disk(job: Job, _place: Workplace, _draw: random.Random) -> None:
    """While one checkpoint at least is written."""
    pids, step = ranks(job), job.records()[-1]["step"]
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_FULL_BYTES, resource.RLIM_INFINITY))
    wait_until(lambda: job.records()[-1]["step"] >= step + 22 or job.pids("train.py") != pids, 300, job.story())
    for pid in pids:
        if Path(f"/proc/{pid}").exists():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def corrupted_checkpoint(job: Job, place: Workplace, draw: random.Random) -> None:
    """Of the newest, a byte in the middle of the largest file; then a rank is killed."""
    newest = max(job.run_dir.glob("checkpoints/step-*/COMMITTED")).parent
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))
    killed_rank(job, place, draw)


FAULTS: dict[str, Fault] = {
    "SIGUSR1 to the job": Fault(usr1),
    "SIGUSR1 to one rank": Fault(usr1_to_one_rank),
    "rank SIGKILLed": Fault(killed_rank),
    "all ranks SIGKILLed": Fault(two_killed),
    "a rank of the restart, too": Fault(killed_again),
    "rank SIGSTOPped": Fault(stopped_rank),
    "slow node": Fault(slow_node, restarts=False),
    "launcher SIGKILLed": Fault(killed_launcher),
    "node down": Fault(node_down),
    "preempted": Fault(preemption),
    "full disk": Fault(full_disk, restarts=False),
    "newest checkpoint damaged": Fault(corrupted_checkpoint),
}
