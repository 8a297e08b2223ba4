"""One run, interrupted again and again by random faults, against an uninterrupted one; prints a table of them.

    python tests/slurm/soak.py DIRECTORY [--faults 50] [--seed 0]

On a private Slurm of three virtual nodes, one of them spare, with copies in memory every five steps. Nodes that were
excluded are repaired at once: a job that is requeued may have them again. Not collected by pytest: 50 faults take about
an hour on two idle cores.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from cluster import Cluster, wait_until
from jobs import Job, Program, Workplace
from soak_faults import FAULTS, Fault

EVERY = 20
BETWEEN = 25
"""Steps that a run makes between two faults."""
ON = 3
"""Steps after which a run that no fault ended has recovered."""
NODES, SPARES = 3, 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS), help="kinds of faults")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    steps = BETWEEN * (options.faults + 1)
    arguments = ["--recipe=demo_vision", f"--optim.max_steps={steps}", f"--checkpoint.every={EVERY}"]
    arguments += ["--tracking.log_every=1", "--tracking.enabled=false", "--hang_limit_minutes=0.5"]
    arguments += ["--evaluation.train=null", "--evaluation.test=null", "--checkpoint.memory.every=5"]
    with Cluster(options.directory / "cluster", nodes=NODES) as cluster:
        cluster.env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        cluster.env |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "SBATCH_GPUS_PER_NODE": "1"}
        cluster.env |= {"D2V_SCALE_PREFLIGHT": "0"}
        repository = Path(__file__).resolve().parents[2]
        place = Workplace(cluster, options.directory / "repository", Program(tuple(arguments)), repository)
        given = (f"--spares={SPARES}",)
        reference = place.submit("pretrain_base.sh", options=(f"--nodes={NODES - SPARES}",))
        assert reference.wait_for_end(timeout_s=7200) == "COMPLETED", reference.story()
        job = place.submit("pretrain_base.sh", *given, options=(f"--nodes={NODES}", "--no-kill"))
        names = [options.only[index % len(options.only)] for index in range(options.faults)]
        draw.shuffle(names)
        struck = [strike(job, place, draw, number, name) for number, name in enumerate(names, 1)]
        assert wait_for(job, "COMPLETED"), job.story()
        same = job.weights() == reference.weights() and job.losses() == reference.losses()
    print_table(names, struck)
    print(f"\n{steps} steps, {options.faults} faults; weights and losses identical to the uninterrupted run: {same}")
    return 0 if same else 1


def strike(job: Job, place: Workplace, draw: random.Random, number: int, name: str) -> tuple[int, float]:
    """One fault, and the way back: (steps done twice, seconds from the last step before it to the first one after)."""
    step = BETWEEN * number + draw.randrange(-5, 6)
    wait_until(lambda: step_of(job) >= step, 1800, f"step {step} is not reached\n{job.story()}")
    reached, began = step_of(job), time.time()
    print(f"{number:3} {name:26} at step {reached}", flush=True)
    FAULTS[name].strike(job, place, draw)
    ended = time.time()
    wait_until(lambda: has_recovered(job, FAULTS[name], began, ended), 900, f"no recovery\n{job.story()}")
    found = interruption(job.run_dir, began)
    print(f"    {found[0]} steps again, {found[1]:.0f} s", flush=True)
    return found


def step_of(job: Job) -> int:
    repair(job)
    records = job.records()
    return int(records[-1]["step"]) if records else 0


def repair(job: Job) -> None:
    """What an operator does: a requeued job gets its nodes again, and does not wait for Slurm's two minutes."""
    facts = job.cluster.job(job.id)
    if facts.get("JobState") == "PENDING":
        if facts.get("ExcNodeList", "(null)") != "(null)":
            job.cluster.run("scontrol", "update", f"JobId={job.id}", "ExcNodeList=", check=False)
        if facts.get("Reason") == "BeginTime":
            job.cluster.release(job.id)


def wait_for(job: Job, state: str) -> bool:
    def reached() -> bool:
        repair(job)
        return job.state == state

    wait_until(reached, 1800, f"the job does not end\n{job.story()}")
    return True


def has_recovered(job: Job, fault: Fault, began: float, ended: float) -> bool:
    """Whether a step was made after the fault: by a later attempt, if the fault ends one."""
    repair(job)
    after = [one for one in trained(job.run_dir) if one["time"] > ended]
    if not fault.restarts and len(after) >= ON:
        return True
    last = begun(job.run_dir)[-1]
    return last > began and any(one["time"] > last for one in after)


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a file of JSON, none where there is no file."""
    text = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in text if line.endswith("\n")]


def begun(run_dir: Path) -> list[float]:
    """When attempts began to train."""
    return [line["time"] for line in lines(run_dir / "timeline.jsonl") if line["event"] == "begin"]


def trained(run_dir: Path) -> list[dict[str, Any]]:
    """All steps that were recorded, those done again included, in the order of time. An attempt that continues from a
    checkpoint moves the records after it to another file."""
    files = (run_dir / "metrics.jsonl", run_dir / "logs/metrics_superseded.jsonl")
    return sorted((line for file in files for line in lines(file) if "loss" in line), key=lambda one: one["time"])


def interruption(run_dir: Path, began: float) -> tuple[int, float]:
    """(steps done twice, seconds without a step) of the longest wait since a moment."""
    steps = trained(run_dir)
    first = max((number for number, one in enumerate(steps) if one["time"] <= began), default=0)
    pairs = list(zip(steps[first:], steps[first + 1 :], strict=False))
    again = sum(max(0, before["step"] + 1 - after["step"]) for before, after in pairs)
    return again, max(after["time"] - before["time"] for before, after in pairs)


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


if __name__ == "__main__":
    sys.exit(main())
