"""Start programs, or several ranks of one, on this machine, with a time limit and no orphans."""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROCESS = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Rank:
    """A process of `rank_server`, with as much of `subprocess.Popen` as tests use; it leads a session of its own."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._log = log

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")


@cache
def server() -> subprocess.Popen[str]:
    """Started once; ends with this process, or when that is killed: its input ends."""
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
        env={**os.environ, **PROCESS, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(process.communicate)
    return process


def ask(request: dict[str, Any]) -> Any:
    """The server's answer. Raises AssertionError when it is gone."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, "the server of ranks has ended"
    return json.loads(answer)


@cache
def _logs() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ranks-")


def start_program(
    script: Path, *args: str, environment: dict[str, str], cwd: Path | None = None, fresh: bool = False
) -> Rank:
    """The process `python SCRIPT ARGS`, in a session of its own, with the imports that take long done already.

    `fresh`: with an interpreter of its own, as `environment` has what the C library reads when a process starts.
    """
    log = Path(tempfile.mkstemp(dir=_logs().name)[1])
    request = {
        "script": str(script),
        "arguments": args,
        "cwd": str(cwd or Path.cwd()),
        "environment": environment,
        "log": str(log),
        "fresh": fresh,
    }
    return Rank(ask(request), log)


def start_ranks(
    world_size: int, script: Path, *args: str, env: dict[str, str] | None = None, fresh: bool = False
) -> list[Rank]:
    """One process a rank, as `start_program` starts them."""
    base = {
        **os.environ,
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        **PROCESS,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        **(env or {}),
    }
    return [
        start_program(script, *args, environment={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)}, fresh=fresh)
        for rank in range(world_size)
    ]


def stop(ranks: list[Rank]) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def run_program(script: Path, *args: str, cwd: Path | None = None, timeout: float = 240.0) -> tuple[int, str]:
    """Run `python SCRIPT ARGS` to the end, as `start_program` does: exit code, and all that it printed."""
    program = start_program(script, *args, environment={**os.environ, **PROCESS}, cwd=cwd)
    try:
        return program.wait(timeout), program.output()
    finally:
        stop([program])


def run_ranks(
    world_size: int,
    script: Path,
    *args: str,
    timeout: float = 240.0,
    env: dict[str, str] | None = None,
    fresh: bool = False,
) -> list[str]:
    """Run to the end; the output of each rank. Raises AssertionError with all output when one fails."""
    ranks = start_ranks(world_size, script, *args, env=env, fresh=fresh)
    deadline = time.monotonic() + timeout
    try:
        for rank in ranks:
            rank.wait(deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        stop(ranks)
        text = "\n".join(rank.output() for rank in ranks)
        raise AssertionError(f"ranks did not finish within {timeout} s\n{text[-6000:]}") from None
    finally:
        stop(ranks)
    if any(rank.returncode for rank in ranks):
        codes = [rank.returncode for rank in ranks]
        raise AssertionError(f"ranks ended with {codes}\n" + "\n".join(rank.output()[-4000:] for rank in ranks))
    return [rank.output() for rank in ranks]
