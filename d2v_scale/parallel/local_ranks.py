"""The ranks of one machine as children of this process, which passes signals on and ends as they end.

`deepspeed` and `torchrun` do neither: SIGUSR1 ends their launchers, SIGINT and SIGTERM end the ranks before they have
saved, and `torchrun` replaces their exit codes by 1. Standard library only.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from types import FrameType

_TO_STOP = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_TO_PROFILE = signal.SIGUSR2
AGAIN_S = 5.0
"""A wish to stop is repeated so often: a rank that was starting has missed it, to others it is no news."""
GRACE_S = 60.0
"""What others have left when a rank has failed: they find out by themselves, and write down why they end."""
_POLL_S = 0.1
_LEFTOVERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def count_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that PyTorch sees, asked in another process: it is slow to import, and the ranks want the GPUs unused."""
    if environment.get("DS_ACCELERATOR") == "cpu":
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def become(command: list[str], environment: Mapping[str, str]) -> int:
    """This process becomes another program. Does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def free_port() -> int:
    """A TCP port of this machine that nobody listens to now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(command: list[str], ranks: int, environment: Mapping[str, str], *, share_cores: bool) -> int:
    """Start `command` as so many ranks and wait for them; 0, or the code of the one that failed first.

    `share_cores`: each computes on its part of the processor. A rank that died of a signal counts as 128 and its
    number, as in a shell. Main thread only.
    """
    common = {key: value for key, value in environment.items() if key not in _LEFTOVERS}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if share_cores:
        common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    group = _Ranks()
    kept = {number: signal.getsignal(number) for number in (*_TO_STOP, _TO_PROFILE)}
    for number in _TO_STOP:
        if number != signal.SIGHUP or kept[number] != signal.SIG_IGN:  # `nohup` keeps its meaning
            signal.signal(number, group.on_signal)
    signal.signal(_TO_PROFILE, lambda number, _: group.send(number))
    try:
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(command, env={**common, **own}, preexec_fn=_ignore_for_now)
            group.processes.append(process)
        return group.wait()
    finally:
        group.send(signal.SIGKILL)
        for number, handler in kept.items():
            signal.signal(number, handler)


def _ignore_for_now() -> None:
    """In a rank that is about to be started: what would end it passes over it until it has its own handlers."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class _Ranks:
    """The processes, and the wish to stop that they get again and again."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._wish: int | None = None
        self._again = 0.0

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._wish, self._again = number, time.monotonic() + AGAIN_S
        self.send(number)

    def send(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)  # not to one that has ended

    def wait(self) -> int:
        """Until all have ended. When one has failed, the others have so long to end by themselves."""
        failed, limit = 0, float("inf")
        while True:
            codes = [process.poll() for process in self.processes]
            now = time.monotonic()
            if not failed:
                failed = next((128 - code if code < 0 else code for code in codes if code), 0)
                limit = now + GRACE_S if failed else limit
            if None not in codes:
                return failed
            if now >= limit:
                self.send(signal.SIGKILL)
            if self._wish is not None and now >= self._again:
                self._again = now + AGAIN_S
                self.send(self._wish)
            time.sleep(_POLL_S)
