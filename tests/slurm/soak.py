"""One run, interrupted again and again by random faults, against an uninterrupted one; prints a table of them.

    python tests/slurm/soak.py DIRECTORY [--faults 25] [--seed 0] [--ranks_per_node 2]

Not collected by pytest: 25 faults take about half an hour on two idle cores.
"""

import argparse
import json
import os
import random
import signal
import sys
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
    job.cluster.revive(node)


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
            step, restarts = job.records()[-1]["step"], restarts_of(job)
            print(f"{index + 1:3} {name:20} at step {step}", flush=True)
            FAULTS[name](job, place, draw)
            wait_until(partial(recovered, job, restarts), 900, "the run does not recover")
        assert job.wait_for_end(timeout_s=900) == "COMPLETED", job.story()
        struck = interruptions(job.run_dir)
        assert len(struck) == options.faults, struck
        same = job.weights() == reference.weights() and job.losses() == reference.losses()
    print_table(names, struck)
    print(f"\n{steps} steps, {options.faults} faults; weights and losses identical to the uninterrupted run: {same}")
    return 0 if same else 1


def print_table(names: list[str], struck: list[tuple[int, float]]) -> None:
    print(
        "\n| fault | times | steps done twice, mean (most) | seconds without a step, mean (most) |\n|---|---|---|---|"
    )
    for fault in FAULTS:
        values = [value for name, value in zip(names, struck, strict=True) if name == fault]
        if values:
            lost, seconds = zip(*values, strict=True)
            spread = f"{mean(lost):.1f} ({max(lost)}) | {mean(seconds):.0f} ({max(seconds):.0f})"
            print(f"| {fault} | {len(values)} | {spread} |")


def restarts_of(job: Job) -> int:
    return int(job.cluster.job(job.id).get("Restarts", "0"))


def recovered(job: Job, restarts: int) -> bool:
    """An attempt later than the one that the fault struck has made a step."""
    facts = job.cluster.job(job.id)
    if facts.get("JobState") == "PENDING" and facts.get("Reason") == "BeginTime":
        job.cluster.release(job.id)
    hostfile = job.run_dir / f"logs/{job.id}-{restarts + 1}/hostfile"
    records = job.records()
    return hostfile.is_file() and bool(records) and records[-1]["time"] > hostfile.stat().st_mtime


def interruptions(run_dir: Path) -> list[tuple[int, float]]:
    """(steps done twice, seconds from the last step before it to the first one after) of every interruption.

    From the record: an attempt that continues from a checkpoint moves the records after it to another file.
    """
    steps = []
    for name in ("metrics.jsonl", "logs/metrics_superseded.jsonl"):
        if (run_dir / name).exists():
            steps += [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    steps = sorted((one for one in steps if "loss" in one), key=lambda one: one["time"])
    starts = [json.loads(line)["time"] for line in (run_dir / "attempts.jsonl").read_text().splitlines()][:-1]
    found = []
    for ended in starts:
        before = max((one for one in steps if one["time"] <= ended), key=lambda one: one["time"])
        after = min((one for one in steps if one["time"] > ended), key=lambda one: one["time"])
        found.append((before["step"] + 1 - after["step"], after["time"] - before["time"]))
    return found


if __name__ == "__main__":
    sys.exit(main())
