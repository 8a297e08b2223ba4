"""The ranks of one machine as children of this process, which passes signals on and ends as they end.

`deepspeed` and `torchrun` do neither: SIGUSR1 ends their launchers, SIGINT and SIGTERM end the ranks before they have
saved, and `torchrun` replaces their exit codes by 1. Torch-free.
"""

import contextlib
import ctypes
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
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
LEFTOVERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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
    common = {key: value for key, value in environment.items() if key not in LEFTOVERS}
    common |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    if share_cores:
        common.setdefault("OMP_NUM_THREADS", own_threads(ranks))
    group = Ranks(restarts=again is not None, is_saving=is_saving)
    with group.signals():
        common.setdefault(STARTED, str(started()))
        further: list[str] = []
        for restart in itertools.count():
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), RESTART: str(restart)}
            places = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks))
            group.start([*command, *further], ({**common, **place} for place in places))
            while (code := group.poll()) is None:
                time.sleep(_POLL_S)
            if code == 0 or again is None or group.is_asked_to_stop:
                return code
            wanted = again(code, float(common[STARTED]))
            if wanted is None or group.is_asked_to_stop:
                return code
            common[STARTED], further = str(time.time()), wanted
            group.forget()
        raise AssertionError("unreachable")


def own_threads(ranks: int) -> str:
    """OMP_NUM_THREADS where so many ranks share the processor."""
    return str(max(1, len(os.sched_getaffinity(0)) // ranks))


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _before_rank(launcher: int) -> None:
    """In a rank that is about to be started: it ends with its launcher, also one that is killed, as nobody would end or
    follow it then; other signals that would end it pass over it until it has its own handlers."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != launcher:
        os._exit(1)
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


class Ranks:
    """The processes of one machine, and the signals that they have not got yet.

    Each rank gets a signal once: a rank that is ending has its handlers no more, and would die of a second one.
    """

    def __init__(self, *, restarts: bool, is_saving: Callable[[Collection[int]], bool] | None = None) -> None:
        """`restarts`: ranks that failed may be started again. `is_saving`: as for `run`."""
        self._restarts, self._is_saving = restarts, is_saving
        self._wishes: list[int] = []
        self.forget()

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a signal came that asks for an end; SIGUSR2 asks for a profile."""
        return any(number != signal.SIGUSR2 for number in self._wishes)

    def _grace_s(self, code: int) -> float:
        """What others have left when the first has ended with this code."""
        if not self._restarts or self.is_asked_to_stop or code in _AGREED:
            return GRACE_S
        return HANG_GRACE_S if code == EXIT_REQUEUE else RESTART_GRACE_S

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, signals to this process are wishes of the ranks; at the end those that still live are killed. Main
        thread only."""
        kept = {number: signal.getsignal(number) for number in _PASSED_ON}
        for number in _PASSED_ON:
            if number != signal.SIGHUP or kept[number] != signal.SIG_IGN:  # `nohup` keeps its meaning
                signal.signal(number, self.on_signal)
        try:
            yield
        finally:
            self.kill()
            for number, handler in kept.items():
                signal.signal(number, handler)

    def start(self, command: list[str], environments: Iterable[Mapping[str, str]]) -> None:
        """One process for each environment. Those of an earlier attempt must have been forgotten."""
        assert not self.processes
        before = partial(_before_rank, os.getpid())
        for environment in environments:
            self.processes.append(subprocess.Popen(command, env=environment, preexec_fn=before))

    def forget(self) -> None:
        """Those that have ended. A wish to stop that came meanwhile is for those who follow."""
        self.processes: list[subprocess.Popen[bytes]] = []
        self._got: list[int] = []
        """By rank: how many of the wishes."""
        self._wishes = [number for number in self._wishes if number != signal.SIGUSR2]
        self.failed = 0
        """The code of the one that failed first."""
        self._limit, self._last = float("inf"), float("inf")
        """When those that still live are ended, and when at the latest."""

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGUSR2 or number not in self._wishes:  # a job's script may ask again and again
            self._wishes.append(number)

    def kill(self) -> None:
        """End those that have not ended."""
        for process in self.processes:
            process.kill()

    @property
    def ended(self) -> list[int]:
        """Which of them have ended, by their numbers on this machine."""
        return [rank for rank, process in enumerate(self.processes) if process.poll() is not None]

    def _pass_on(self) -> None:
        """Give each rank, in their order, the signals that it does not ignore at this time."""
        self._got += [0] * (len(self.processes) - len(self._got))
        for rank, process in enumerate(self.processes):
            while self._got[rank] < len(self._wishes) and not _ignores(process, self._wishes[self._got[rank]]):
                process.send_signal(self._wishes[self._got[rank]])  # not to one that has ended
                self._got[rank] += 1

    def poll(self, elsewhere: int = 0) -> int | None:
        """None as long as one lives; then 0, or the code of the one that failed first. `elsewhere`: the code that a
        rank of another machine failed with. When one has failed, here or there, the others have so long to end by
        themselves; what they end with then is no failure of this machine's."""
        codes = [process.poll() for process in self.processes]
        now = time.monotonic()
        if not self.failed and self._limit == float("inf"):
            self.failed = next((128 - code if code < 0 else code for code in codes if code), 0)
        first = self.failed or elsewhere
        if first and self._limit == float("inf"):
            self._limit, self._last = now + self._grace_s(first), now + GRACE_S
        if None not in codes:
            return self.failed
        if first and self._is_saving and self._is_saving(self.ended):
            self._limit = max(self._limit, min(now + RESTART_GRACE_S, self._last))
        if now >= self._limit:
            self.kill()
        self._pass_on()
        return None
