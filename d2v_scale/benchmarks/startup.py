"""From the launcher to the end of the first training step, against an empty job of the same launcher.

The empty job forms DeepSpeed's process groups and meets in a barrier. Both are started by `deepspeed`, in turns; the
time runs until the first step is in the record, or the barrier is passed. The ratio is ours over the empty job's.
"""

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from d2v_scale.errors import UserError

_ROOT = Path(__file__).resolve().parents[2]
_EMPTY = """
import sys
import deepspeed
import torch.distributed as dist

if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed(verbose=False)
dist.barrier()
open(sys.argv[-1], "w").write("done\\n")
dist.destroy_process_group()
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py startup`."""
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a job may take")


def run(options: argparse.Namespace) -> int:
    """Print one row."""
    with tempfile.TemporaryDirectory() as folder:
        ours, empty = measure(Path(folder), options.ranks, options.rounds, options.limit)
    ratios = sorted(a / b for a, b in zip(ours, empty, strict=True))
    print(
        f"{options.ranks} ranks, {options.rounds} rounds: first step after {statistics.median(ours):.1f} s, empty job "
        f"{statistics.median(empty):.1f} s   rounds {ratios[0]:.2f}-{ratios[-1]:.2f}   {statistics.median(ratios):.2f}x"
    )
    return 0


def measure(folder: Path, ranks: int, rounds: int, limit_s: float) -> tuple[list[float], list[float]]:
    """Seconds of each round: the vision demo to its first step, and the empty job."""
    script = folder / "empty.py"
    script.write_text(_EMPTY)
    keys = ["--recipe", "demo_vision", "--evaluation.train", "null", "--evaluation.test", "null"]
    keys += ["--tracking.enabled", "false", "--stop_at", "1"]
    ours: list[float] = []
    empty: list[float] = []
    for number in range(rounds + 1):
        run_dir, done = folder / f"run{number}", folder / f"done{number}"
        train = [str(_ROOT / "d2v_scale" / "train.py"), *keys, "--run_dir", str(run_dir)]
        jobs = [(ours, train, run_dir / "metrics.jsonl"), (empty, [str(script), str(done)], done)]
        for seconds, job, sign in jobs if number % 2 == 0 else reversed(jobs):
            elapsed = _until(job, sign, ranks, limit_s, folder)
            # The first round makes the demo's shards and warms the file cache.
            if number:
                seconds.append(elapsed)
    return ours, empty


def _until(job: list[str], sign: Path, ranks: int, limit_s: float, folder: Path) -> float:
    """Seconds from the start of a job until `sign` has content. Raises UserError where it never does."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    command = [sys.executable, launcher, "--num_gpus", str(ranks), "--master_port", str(port), *job]
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    log = folder / "log.txt"
    with log.open("w") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
        try:
            while not _has_content(sign):
                ended = process.poll() is not None and not _has_content(sign)
                if ended or time.perf_counter() - begin > limit_s:
                    raise UserError(
                        f"A job did not reach its first step:\n{log.read_text()[-1000:]}", "See its output."
                    )
                time.sleep(0.02)
            elapsed = time.perf_counter() - begin
            process.wait(limit_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return elapsed


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
