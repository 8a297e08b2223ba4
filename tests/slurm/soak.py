"""One run, interrupted again and again by random faults, against an uninterrupted one; prints a table of them.

    python tests/slurm/soak.py DIRECTORY [--faults 25] [--seed 0] [--ranks_per_node 2]

Not collected by pytest: 25 faults take about half an hour on two idle cores.
"""

import argparse
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean

from cluster import Cluster, wait_until
from jobs import ENDED, Job, Program, Workplace

EVERY = 20
BETWEEN = 25
"""Steps that a run makes between two faults."""

Fault = Callable[[Job, Workplace, random.Random], None]


def usr1(job: Job, _place: Workplace, _draw: random.Random) -> None:
    job.cluster.run("scancel", "--batch", "--signal=USR1", job.id)


def usr1_to_one_rank(job: Job, _place: Workplace, draw: random.Random) -> None:
    os.kill(draw.choice(job.pids("train.py")), signal.SIGUSR1)


def killed_rank(job: Job, _place: Workplace, draw: random.Random) -> None:
    os.kill(draw.choice(job.pids("train.py")), signal.SIGKILL)


def stopped_rank(job: Job, _place: Workplace, draw: random.Random) -> None:
    os.kill(draw.choice(job.pids("train.py")), signal.SIGSTOP)


def node_down(job: Job, _place: Workplace, draw: random.Random) -> None:
    node = draw.choice(job.cluster.nodes)
    job.cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=soak")
    job.wait_for_state("PENDING", "COMPLETING")
    job.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)


def preemption(job: Job, place: Workplace, _draw: random.Random) -> None:
    options = ("--partition=urgent", "--nodes=2", "--exclusive", "--parsable", "--output=/dev/null")
    urgent = place.cluster.run("sbatch", *options, "--wrap=sleep 1").strip()
    wait_until(lambda: place.cluster.state(urgent) in ENDED, 120, "the urgent job does not end")


FAULTS: dict[str, Fault] = {
    "SIGUSR1 to the job": usr1,
    "SIGUSR1 to one rank": usr1_to_one_rank,
    "rank SIGKILLed": killed_rank,
    "rank SIGSTOPped": stopped_rank,
    "node down": node_down,
    "preempted": preemption,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--faults", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks_per_node", type=int, default=2, help="processes on each of the two nodes")
    options = parser.parse_args()
    draw, ranks = random.Random(options.seed), str(options.ranks_per_node)
    steps = BETWEEN * (options.faults + 1)
    arguments = ["--recipe=demo_vision", f"--optim.max_steps={steps}", f"--checkpoint.every={EVERY}"]
    arguments += ["--tracking.log_every=1", "--tracking.enabled=false", "--hang_limit_minutes=0.5"]
    arguments += ["--evaluation.train=null", "--evaluation.test=null"]
    program = Program(tuple(arguments))
    measured: dict[str, list[tuple[int, float]]] = {name: [] for name in FAULTS}
    with Cluster(options.directory / "cluster") as cluster:
        cluster.env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        cluster.env |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "SBATCH_GPUS_PER_NODE": ranks}
        cluster.env |= {"D2V_SCALE_PREFLIGHT": "0"}
        place = Workplace(cluster, options.directory / "repository", program, Path(__file__).resolve().parents[2])
        reference = place.submit("pretrain_base.sh")
        assert reference.wait_for_end(timeout_s=3600) == "COMPLETED", reference.story()
        job = place.submit("pretrain_base.sh")
        names = [list(FAULTS)[index % len(FAULTS)] for index in range(options.faults)]
        draw.shuffle(names)
        for index, name in enumerate(names):
            job.wait_for_step(BETWEEN * (index + 1) + draw.randrange(-5, 6), timeout_s=900)
            began, before, restarts = time.monotonic(), job.records()[-1]["step"], restarts_of(job)
            FAULTS[name](job, place, draw)
            wait_until(partial(recovered, job, before, restarts), 900, "the run does not recover")
            seconds = time.monotonic() - began
            lost = max(0, before - continued_from(job))
            measured[name].append((lost, seconds))
            print(f"{index + 1:3} {name:20} at step {before}: {lost} steps lost, {seconds:.0f} s", flush=True)
        assert job.wait_for_end(timeout_s=900) == "COMPLETED", job.story()
        same = job.weights() == reference.weights() and job.losses() == reference.losses()
    print("\n| fault | times | steps done twice (mean) | seconds to the next new step (mean) |\n|---|---|---|---|")
    for name, values in measured.items():
        if values:
            lost_steps, seconds_each = zip(*values, strict=True)
            print(f"| {name} | {len(values)} | {mean(lost_steps):.1f} | {mean(seconds_each):.0f} |")
    print(f"\n{steps} steps, {options.faults} faults; weights and losses identical to the uninterrupted run: {same}")
    return 0 if same else 1


def restarts_of(job: Job) -> int:
    return int(job.cluster.job(job.id).get("Restarts", "0"))


def recovered(job: Job, step: int, restarts: int) -> bool:
    """The run has passed `step` in a later attempt than the one that the fault struck."""
    facts = job.cluster.job(job.id)
    if facts.get("JobState") == "PENDING" and facts.get("Reason") == "BeginTime":
        job.cluster.release(job.id)
    records = job.records()
    return int(facts.get("Restarts", "0")) > restarts and bool(records) and records[-1]["step"] > step


def continued_from(job: Job) -> int:
    """The step that the current attempt continued from."""
    return min((record["step"] for record in job.records() if record["time"] > started(job)), default=1) - 1


def started(job: Job) -> float:
    """When the current attempt began, Unix time in seconds."""
    newest = max((job.run_dir / "logs").glob(f"{job.id}-*/hostfile"), key=lambda path: path.stat().st_mtime)
    return newest.stat().st_mtime


if __name__ == "__main__":
    sys.exit(main())
