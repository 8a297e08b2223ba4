"""The programs of one source tree, each in a process of its own without importing everything anew: a server forks them.

Only what is public is used: `d2v_scale/train.py` and the scripts in `tools/`, so that any two revisions can be run.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

TRAIN = "d2v_scale/train.py"
_WARMING = ((TRAIN, "--print_config"), ("tools/export.py", "--help"), ("tools/probe.py", "--help"))
"""What the server itself runs first, for what is imported then; only the first must be there."""
TIMEOUT_S = 3600.0
_LOG = "programs.log"


class SideError(Exception):
    """A tree whose programs do not start, or do not end."""


@dataclass(frozen=True)
class Ended:
    """A program that has ended: the exit codes of its ranks, and all that rank 0 printed."""

    codes: tuple[int, ...]
    output: str

    @property
    def code(self) -> int:
        """The largest of its ranks' exit codes."""
        return max(self.codes, key=abs)

    @property
    def last_line(self) -> str:
        """What it printed last, which is where a program says why it ended."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


class Side:
    """One tree's programs. They run in `folder`, on the CPU, with one thread a rank."""

    def __init__(self, name: str, root: Path, folder: Path) -> None:
        self.name, self.root, self.folder = name, root, folder
        folder.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "SLURM_", "OMPI_"))}
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            kept.pop(key, None)
        self._environment = {**kept, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self._running: set[int] = set()
        self._programs = 0
        self._server: subprocess.Popen[str] | None = None

    def path(self, script: str) -> Path:
        """A file of the tree."""
        return self.root / script

    def run(self, script: str | Path, *arguments: object, ranks: int = 1) -> Ended:
        """Run a script of the tree (or any, by an absolute path) to its end. Raises SideError after `TIMEOUT_S`."""
        environments = [self._environment] if ranks == 1 else [self._rank(rank, ranks) for rank in range(ranks)]
        self._programs += 1
        logs = [self.folder / f"program-{self._programs:04d}-{rank}.log" for rank in range(ranks)]
        pids = [
            self._ask(
                {
                    "script": str(self.root / script),
                    "arguments": list(map(str, arguments)),
                    "environment": environment,
                    "log": str(log),
                }
            )
            for environment, log in zip(environments, logs, strict=True)
        ]
        self._running.update(pids)
        codes: dict[int, int] = {}
        deadline = time.monotonic() + TIMEOUT_S
        while len(codes) < ranks:
            for pid in self._running.intersection(pids):
                code = self._ask({"poll": pid})
                if code is not None:
                    codes[pid] = code
                    self._running.discard(pid)
            if time.monotonic() > deadline:
                self._kill()
                raise SideError(f"{self.name}: {script} {' '.join(map(str, arguments))} did not end: see {logs[0]}")
            time.sleep(0.05)
        return Ended(tuple(codes[pid] for pid in pids), logs[0].read_text(errors="replace"))

    def close(self) -> None:
        """End whatever still runs, and the server."""
        self._kill()
        if self._server is not None:
            self._server.kill()
            self._server.communicate()
            self._server = None

    def _kill(self) -> None:
        for pid in self._running:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._running.clear()

    def _rank(self, rank: int, ranks: int) -> dict[str, str]:
        if rank == 0:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self._port = free.getsockname()[1]
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._port)}
        return {**self._environment, **{key: str(value) for key, value in place.items()}, **address}

    def _ask(self, request: dict[str, Any]) -> Any:
        if self._server is None:
            with (self.folder / _LOG).open("w") as log:
                self._server = subprocess.Popen(
                    [sys.executable, __file__, str(self.root)],
                    cwd=self.folder,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            if json.loads(self._line() or "1") != 0:
                raise SideError(f"{self.name}: {TRAIN} does not start:\n{(self.folder / _LOG).read_text()[-2000:]}")
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> str:
        assert self._server is not None
        assert self._server.stdout is not None
        return self._server.stdout.readline()


def _serve(requests: TextIO, answers: TextIO) -> dict[str, Any] | None:
    """Answer until the input ends. Returns in the forks, too: there with the request that they are to carry out."""
    for line in requests:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), file=answers, flush=True)
    return None


def _run(script: str, arguments: Sequence[str]) -> None:
    """The script as an interpreter of its own would run it."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def _ended(script: str, argument: str) -> int:
    """Run a script here that ends at once; its exit code."""
    root, arguments = sys.argv[1], list(sys.argv)
    try:
        _run(str(Path(root, script)), [argument])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = arguments
    return 0


def _become(request: dict[str, Any]) -> None:
    import logging

    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(source, number)
    os.environ.clear()
    os.environ.update(request["environment"])
    logging.root.handlers.clear()
    _run(request["script"], request["arguments"])


def _main() -> None:
    """`revision_side.py ROOT`: import what the tree's programs import, by running some that end at once, then serve."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the script prints is no answer
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)
    handlers = {number: signal.getsignal(number) for number in numbers}
    path = list(sys.path[1:])
    codes = []
    for script, argument in _WARMING:
        if Path(sys.argv[1], script).exists() or script == TRAIN:
            codes.append(_ended(script, argument))
            sys.path[:] = path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    print(json.dumps(codes[0]), file=answers, flush=True)
    request = _serve(sys.stdin, answers)
    answers.close()
    if request is not None:
        _become(request)


if __name__ == "__main__":
    _main()
