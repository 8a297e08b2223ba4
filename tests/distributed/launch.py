"""Start several ranks of a worker script on this machine, with a time limit and no orphans."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(world_size: int, script: Path, *args: str, env: dict[str, str] | None = None) -> list[subprocess.Popen]:
    """One process a rank, each in a session of its own; output goes to pipes."""
    base = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        **(env or {}),
    }
    return [
        subprocess.Popen(
            [sys.executable, str(script), *args],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]


def stop(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_ranks(
    world_size: int, script: Path, *args: str, timeout: float = 240.0, env: dict[str, str] | None = None
) -> list[str]:
    """Run to the end; the output of each rank. Raises AssertionError with all output when one fails."""
    processes = start_ranks(world_size, script, *args, env=env)
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    except subprocess.TimeoutExpired:
        stop(processes)
        text = "\n".join(
            process.stdout.read() if process.stdout and not process.stdout.closed else "" for process in processes
        )
        raise AssertionError(f"ranks did not finish within {timeout} s\n{text[-6000:]}") from None
    finally:
        stop(processes)
    if any(process.returncode for process in processes):
        codes = [process.returncode for process in processes]
        raise AssertionError(f"ranks ended with {codes}\n" + "\n".join(o[-4000:] for o in outputs))
    return outputs
