"""Submitting the repository's templates to the private cluster and looking at what came of it."""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster, wait_until

from d2v_scale.process.status import Status, read_status
from d2v_scale.running.attempts import Attempt, read_attempts

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}


@dataclass(frozen=True)
class Program:
    """What the templates start: the training program, or the stand-in with the same contract (`source`)."""

    arguments: tuple[str, ...]
    source: Path | None = None


STAND_IN = Program((), Path(__file__).resolve().parents[1] / "stoppable_run.py")


@dataclass
class Job:
    """One submitted job and its run directory."""

    cluster: Cluster
    id: str
    run_dir: Path
    output: Path

    @property
    def state(self) -> str:
        return self.cluster.state(self.id)

    @property
    def status(self) -> Status:
        found = read_status(self.run_dir)
        assert found is not None, self.story()
        return found

    @property
    def attempts(self) -> list[Attempt]:
        return read_attempts(self.run_dir)

    def records(self) -> list[dict[str, Any]]:
        """The training records of metrics.jsonl; a line that is being written does not count."""
        try:
            lines = (self.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        except OSError:
            return []
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in found if "loss" in record]

    def losses(self) -> dict[int, float]:
        """Loss by step; fails if a step is missing or recorded twice."""
        records = self.records()
        steps = [record["step"] for record in records]
        assert steps == list(range(1, len(steps) + 1)), f"gaps or repeats: {steps}"
        return {record["step"]: record["loss"] for record in records}

    def weights(self) -> dict[str, str]:
        """Digest of every file of the newest checkpoint that holds tensors."""
        newest = max(self.run_dir.glob("checkpoints/step-*/COMMITTED")).parent
        files = [*newest.rglob("*.safetensors")] or [newest / "COMMITTED"]
        return {str(path.relative_to(newest)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def wait_for_step(self, step: int, timeout_s: float = 900) -> None:
        def reached() -> bool:
            assert self.state not in ENDED, self.story()
            records = self.records()
            return bool(records) and records[-1]["step"] >= step

        wait_until(reached, timeout_s, f"step {step} not reached\n{self.story()}")

    def wait_for_state(self, *states: str, timeout_s: float = 240) -> str:
        """Wait for one of the states, releasing the job if it waits for its requeue delay. The state that was seen."""
        seen = ""

        def reached() -> bool:
            nonlocal seen
            job = self.cluster.job(self.id)
            seen = job.get("JobState", "")
            if job.get("Reason") == "BeginTime" and "PENDING" not in states:
                self.cluster.release(self.id)
            return seen in states

        wait_until(reached, timeout_s, f"none of {states}\n{self.story()}")
        return seen

    def wait_for_end(self, timeout_s: float = 900) -> str:
        return self.wait_for_state(*ENDED, timeout_s=timeout_s)

    def pids(self, needle: str) -> list[int]:
        """Process ids of this run's ranks, in the order of their ranks."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
                environment = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if needle in command and "launch" not in command and str(self.run_dir) in command:
                rank = next((int(one[5:]) for one in environment if one.startswith("RANK=")), -1)
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found.append((rank, parent, int(entry.name)))
        ranks = {pid for _, _, pid in found}
        return [pid for rank, parent, pid in sorted(found) if rank >= 0 and parent not in ranks]

    def launchers(self) -> dict[str, int]:
        """Process ids of the nodes' launchers, by node."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except (OSError, ValueError):
                continue
            if "--meet" in words and str(self.run_dir) in "".join(words) and words[0].endswith("python"):
                found[words[words.index("--node") + 1]] = int(entry.name)
        return found

    def story(self) -> str:
        """Everything there is to read about the job, for a failing test's message."""
        files = [self.output, *sorted(self.run_dir.glob("logs/*/*.log")), *sorted(self.run_dir.glob("*.json*"))]
        texts = [f"--- {file}\n{file.read_text(errors='replace')[-3000:]}" for file in files if file.is_file()]
        return "\n".join([str(self.cluster.job(self.id)), *texts])


class Workplace:
    """A directory that jobs are submitted from, with the repository's code in it."""

    def __init__(self, cluster: Cluster, directory: Path, program: Program, repository: Path) -> None:
        self.cluster, self.dir, self.program = cluster, directory, program
        self.jobs: list[Job] = []
        leave_out = shutil.ignore_patterns("__pycache__")
        for name in ("d2v_scale", "ds_configs", "slurm", "tools"):
            shutil.copytree(repository / name, directory / name, ignore=leave_out)
        shutil.copy(repository / "pyproject.toml", directory)
        if program.source is not None:
            shutil.copy(program.source, directory / "d2v_scale/train.py")

    def submit(
        self, template: str, *arguments: str, options: tuple[str, ...] = (), env: dict[str, str] | None = None
    ) -> Job:
        """`sbatch OPTIONS slurm/TEMPLATE PROGRAM'S ARGUMENTS`, on two nodes unless the options say otherwise."""
        run_dir = self.dir / "runs" / f"{Path(template).stem}-{len(self.jobs)}"
        output = self.dir / f"job-{len(self.jobs)}.out"
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={output}", *options]
        command += [str(self.dir / "slurm" / template), *self.program.arguments, *arguments]
        if not any(one.startswith("--resume") for one in arguments):
            command += ["--run_dir", str(run_dir)]
        job_id = self.cluster.run(*command, env=env, cwd=self.dir).strip()
        self.jobs.append(Job(self.cluster, job_id, run_dir, output))
        return self.jobs[-1]

    def close(self) -> None:
        """Cancel what still runs and wait until the nodes are free for the next test."""
        for job in self.jobs:
            self.cluster.run("scancel", "--full", job.id, check=False)
        for node in set(self.cluster.nodes) - self.cluster.idle():
            self.cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        end = time.monotonic() + 40
        while self.cluster.idle() != set(self.cluster.nodes) and time.monotonic() < end:
            time.sleep(0.3)
