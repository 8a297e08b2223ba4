"""The ranks of one machine as children of this process, which passes signals on and ends as they end.

`deepspeed` and `torchrun` do neither: SIGUSR1 ends their launchers, SIGINT and SIGTERM end the ranks before they have
saved, and `torchrun` replaces their exit codes by 1. Torch-free.
"""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType

from d2v_scale.errors import (
    EXIT_BAD_INPUT,
    EXIT_COLLAPSE,
    EXIT_DATA_STARVED,
    EXIT_NON_FINITE,
    EXIT_REQUEUE,
    EXIT_SPIKE,
    UserError,
)
from d2v_scale.parallel import rank_environment
from d2v_scale.process.doing import doing
from d2v_scale.process.started import RESTART, STARTED, started

_PASSED_ON = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
GRACE_S = 60.0
"""What others have left when a rank has failed: they find out by themselves, and write down why they end."""
RESTART_GRACE_S = 0.5
"""The same where all are started again, every second of which is lost; anew as long as they write a checkpoint that
can still become whole, up to `GRACE_S`."""
HANG_GRACE_S = 5.0
"""The same after a hang, which all ranks but those that stand still have noticed, or a time limit, at which rank 0
still tells what there is to tell."""
_AGREED = (EXIT_BAD_INPUT, EXIT_NON_FINITE, EXIT_COLLAPSE, EXIT_DATA_STARVED, EXIT_SPIKE)
"""All ranks end so, rank 0 after its last words."""
_POLL_S = 0.1
_LEFTOVERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def count_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that PyTorch sees, asked in another process: it is slow to import, and the ranks want the GPUs unused."""
    if not rank_environment.may_have_gpu(environment):
        return 0
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    with doing("looking for GPUs"):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else 0


def choose_ranks(wanted: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """How many processes train on this machine, and its GPUs. Raises UserError."""
    gpus = count_gpus(environment)
    ranks = wanted if wanted is not None else max(1, gpus)
    if ranks < 1:
        raise UserError(f"--ranks is {ranks}.", "Give at least 1.")
    if 0 < gpus < ranks:
        raise UserError(f"--ranks is {ranks}, and there are {gpus} GPUs.", f"Give at most {gpus}.")
    return ranks, gpus


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


def run(
    command: list[str],
    ranks: int,
    environment: Mapping[str, str],
    *,
    share_cores: bool,
    again: Callable[[int, float], list[str] | None] | None = None,
    is_saving: Callable[[Collection[int]], bool] | None = None,
) -> int:
    """Start `command` as so many ranks and wait for them; 0, or the code of the one that failed first.

    `environment`: for the ranks; it may say when the run was asked for (`STARTED`), else it was when this process was
    started. `share_cores`: each computes on its part of the processor. A rank that died of a signal counts as 128 and
    its number, as in a shell. `again`: asked when a rank has failed and nobody wished for an end, with the code and
    when the ranks were started; what it returns is added to `command`, and all ranks are started again; None ends.
    `is_saving`: whether without these ranks, which have ended, the others are completing a checkpoint; they are given
    time for it. Main thread only.
    """
    common = {key: value for key, value in environment.items() if key not in _LEFTOVERS}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    if share_cores:
        common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    group = _Ranks(restarts=again is not None, is_saving=is_saving)
    kept = {number: signal.getsignal(number) for number in _PASSED_ON}
    for number in _PASSED_ON:
        if number != signal.SIGHUP or kept[number] != signal.SIG_IGN:  # `nohup` keeps its meaning
            signal.signal(number, group.on_signal)
    try:
        common.setdefault(STARTED, str(started()))
        further: list[str] = []
        for restart in itertools.count():
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), RESTART: str(restart)}
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                process = subprocess.Popen([*command, *further], env={**common, **own}, preexec_fn=_ignore_for_now)
                group.processes.append(process)
            code = group.wait()
            if code == 0 or again is None or group.is_asked_to_stop:
                return code
            wanted = again(code, float(common[STARTED]))
            if wanted is None or group.is_asked_to_stop:
                return code
            common[STARTED], further = str(time.time()), wanted
            group.forget()
        raise AssertionError("unreachable")
    finally:
        group.kill()
        for number, handler in kept.items():
            signal.signal(number, handler)


def _ignore_for_now() -> None:
    """In a rank that is about to be started: what would end it passes over it until it has its own handlers."""
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _ignores(process: "subprocess.Popen[bytes]", number: int) -> bool:
    """Whether a process ignores a signal now; one that has ended does not."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    found = re.search(r"^SigIgn:\s*([0-9a-f]+)$", text, re.MULTILINE)
    return found is not None and bool(int(found.group(1), 16) >> (number - 1) & 1)


class _Ranks:
    """The processes, and the signals that they have not got yet.

    Each rank gets a signal once: a rank that is ending has its handlers no more, and would die of a second one.
    """

    def __init__(self, *, restarts: bool, is_saving: Callable[[Collection[int]], bool] | None = None) -> None:
        """`restarts`: ranks that failed may be started again. `is_saving`: as for `run`."""
        self._restarts, self._is_saving = restarts, is_saving
        self.processes: list[subprocess.Popen[bytes]] = []
        self._wishes: list[int] = []
        self._got: list[int] = []
        """By rank: how many of the wishes."""

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a signal came that asks for an end; SIGUSR2 asks for a profile."""
        return any(number != signal.SIGUSR2 for number in self._wishes)

    def _grace_s(self, code: int) -> float:
        """What others have left when the first has ended with this code."""
        if not self._restarts or self.is_asked_to_stop or code in _AGREED:
            return GRACE_S
        return HANG_GRACE_S if code == EXIT_REQUEUE else RESTART_GRACE_S

    def forget(self) -> None:
        """Those that have ended. A wish to stop that came meanwhile is for those who follow."""
        self.processes, self._got = [], []
        self._wishes = [number for number in self._wishes if number != signal.SIGUSR2]

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._wishes.append(number)

    def kill(self) -> None:
        """End those that have not ended."""
        for process in self.processes:
            process.kill()

    def _pass_on(self) -> None:
        """Give each rank, in their order, the signals that it does not ignore at this time."""
        self._got += [0] * (len(self.processes) - len(self._got))
        for rank, process in enumerate(self.processes):
            while self._got[rank] < len(self._wishes) and not _ignores(process, self._wishes[self._got[rank]]):
                process.send_signal(self._wishes[self._got[rank]])  # not to one that has ended
                self._got[rank] += 1

    def wait(self) -> int:
        """Until all have ended. When one has failed, the others have so long to end by themselves."""
        failed, limit, last = 0, float("inf"), float("inf")
        while True:
            codes = [process.poll() for process in self.processes]
            now = time.monotonic()
            if not failed:
                failed = next((128 - code if code < 0 else code for code in codes if code), 0)
                limit, last = (now + self._grace_s(failed), now + GRACE_S) if failed else (limit, last)
            if None not in codes:
                return failed
            if failed and self._is_saving and self._is_saving([r for r, code in enumerate(codes) if code is not None]):
                limit = max(limit, min(now + RESTART_GRACE_S, last))
            if now >= limit:
                self.kill()
            self._pass_on()
            time.sleep(_POLL_S)
