"""Asking a run to stop, and agreeing on it over all ranks.

Signals and the wall-clock limit only raise a flag; no rank acts on its own. At every step edge the ranks agree by one
small all-reduce, so that all of them save the same step. In the training program:

    stop_flag = StopFlag.install()            # first lines, before the slow imports
    agreement = Agreement()                   # after the process groups exist; collective
    for step in ...:
        train_step()
        stop = agreement.agree(stop_flag.raised())
        if stop is not None:                  # the same value on every rank, at the same step
            save(); break
    agreement.barrier()                       # then rank 0 writes status.json (d2v_scale.process.status)

This module imports torch only inside `Agreement`, because the handlers must stand before the slow imports begin.
"""

import contextlib
import os
import signal
import stat
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import TYPE_CHECKING, Any

from d2v_scale.errors import EXIT_COLLAPSE, EXIT_DATA_STARVED, EXIT_NON_FINITE, EXIT_REQUEUE, EXIT_SPIKE, LostPeer

if TYPE_CHECKING:
    import torch

WORKER_GRACE_S = 60
"""How long a data worker lives on after SIGTERM: the ranks still finish a step and save."""

_RANK_BITS = 32

_SIGNS_OF_A_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "socket timeout",
    "remote process exited",
    "nccl communicator was aborted",
    "ncclremoteerror",
)


class StopReason(IntEnum):
    """Why a run stops before its last step, in rising order of weight: the heaviest reason of all ranks is agreed."""

    TIME_LIMIT = 1
    USR1 = 2
    TERM = 3
    INTERRUPT = 4
    HANGUP = 5
    DATA_STARVED = 6
    COLLAPSE = 7
    NON_FINITE = 8
    SPIKE = 9

    @property
    def exit_code(self) -> int:
        """10 (continue in another job) for signals and the time limit, the verdict's own code otherwise."""
        verdicts = {
            StopReason.DATA_STARVED: EXIT_DATA_STARVED,
            StopReason.COLLAPSE: EXIT_COLLAPSE,
            StopReason.NON_FINITE: EXIT_NON_FINITE,
            StopReason.SPIKE: EXIT_SPIKE,
        }
        return verdicts.get(self, EXIT_REQUEUE)

    @property
    def text(self) -> str:
        """The reason in words, for the log and status.json."""
        return {
            StopReason.TIME_LIMIT: "the wall-clock limit is near",
            StopReason.USR1: "SIGUSR1 received",
            StopReason.TERM: "SIGTERM received",
            StopReason.INTERRUPT: "SIGINT received",
            StopReason.HANGUP: "SIGHUP received, the terminal was closed",
            StopReason.DATA_STARVED: "data starvation",
            StopReason.COLLAPSE: "collapse",
            StopReason.NON_FINITE: "non-finite loss or gradient",
            StopReason.SPIKE: "a spike of the gradient",
        }[self]


_SIGNALS = {
    signal.SIGUSR1: StopReason.USR1,
    signal.SIGTERM: StopReason.TERM,
    signal.SIGINT: StopReason.INTERRUPT,
    signal.SIGHUP: StopReason.HANGUP,
}


_STDOUT = 1


class StopFlag:
    """This process's wish to stop. Signals raise it; further signals change nothing, also during a save."""

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline`: Unix time in seconds from which on the flag is up by itself; None for no limit."""
        self.deadline = deadline
        self.starting = True
        """Until the first step there is nothing to save: Ctrl-C then ends the process at once."""
        self._reason: StopReason | None = None
        self.detail = ""
        """What the user is to know of the reason."""

    @classmethod
    def install(cls, deadline: float | None = None) -> "StopFlag":
        """A flag that SIGUSR1, SIGTERM, SIGINT and SIGHUP raise from now on. Main thread only.

        `nohup` keeps its meaning: what goes on when the terminal is closed is not stopped by it.

        `deadline` defaults to the environment's `D2V_SCALE_DEADLINE` (Unix time in seconds), if it is set.
        """
        assert threading.current_thread() is threading.main_thread(), "signal handlers belong to the main thread"
        if deadline is None and os.environ.get("D2V_SCALE_DEADLINE"):
            deadline = float(os.environ["D2V_SCALE_DEADLINE"])
        flag = cls(deadline)
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, flag._on_signal)
        # It asks for a profile (d2v_scale.process.profiling); until there is something to profile it must not kill.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        return flag

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.starting and number == signal.SIGINT:
            # A live view may have hidden the cursor; what it puts in place of `sys.stdout` may not know a terminal.
            if os.isatty(_STDOUT):
                os.write(_STDOUT, b"\x1b[?25h")
            os._exit(EXIT_REQUEUE)
        if number == signal.SIGHUP:
            _leave_terminal()
        self.up(_SIGNALS[signal.Signals(number)])

    def up(self, reason: StopReason, detail: str = "") -> None:
        """Raise the flag. A verdict of the loop outweighs a signal; of two signals the first stays."""
        if self._reason is None or reason >= StopReason.DATA_STARVED > self._reason:
            self._reason, self.detail = reason, detail

    def raised(self) -> StopReason | None:
        """Why this process wants to stop, None if it does not."""
        if self._reason is None and self.deadline is not None and time.time() >= self.deadline:
            self._reason = StopReason.TIME_LIMIT
        return self._reason


def _leave_terminal() -> None:
    """If the terminal is gone, what is still to be said goes nowhere: writing to it fails, also in other threads."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


@dataclass(frozen=True)
class Stop:
    """What all ranks agreed on: the reason, and one of the ranks that had it."""

    reason: StopReason
    rank: int

    @property
    def exit_code(self) -> int:
        return self.reason.exit_code

    def __str__(self) -> str:
        return f"{self.reason.text} (rank {self.rank})"


class Agreement:
    """One all-reduce (maximum) of eight bytes per step edge over a gloo group of its own.

    It runs in the background while the next step computes and is read one edge later, so it costs no time and never
    waits for the device: a flag handed in at one edge is agreed at the next. Works at world size 1 with no group.
    """

    def __init__(self) -> None:
        """Collective: all ranks must call. A missing peer counts as lost after the time limit of all groups."""
        import torch.distributed as dist

        self._group: Any = None
        self._rank = 0
        self._pending: tuple[Any, torch.Tensor] | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._rank = dist.get_rank()
            self._group = dist.new_group(backend="gloo")

    def agree(self, local: StopReason | None) -> Stop | None:
        """Hand in this rank's flag, get the agreed value of the previous edge. Collective: all ranks must call.

        At world size 1 the answer is immediate. Raises LostPeer if a rank is gone.
        """
        if self._group is None:
            return None if local is None else Stop(local, self._rank)
        import torch
        import torch.distributed as dist

        agreed = self._collect()
        if agreed is None:
            mine = 0 if local is None else (int(local) << _RANK_BITS) | self._rank
            flag = torch.tensor([mine], dtype=torch.int64)
            with _peers_present("agreeing on a stop"):
                work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = (work, flag)
        return agreed

    def _collect(self) -> Stop | None:
        if self._pending is None:
            return None
        (work, flag), self._pending = self._pending, None
        with _peers_present("agreeing on a stop"):
            work.wait()
        value = int(flag)
        return Stop(StopReason(value >> _RANK_BITS), value & ((1 << _RANK_BITS) - 1)) if value else None

    def least(self, mine: list[int]) -> list[int]:
        """The smallest of what all ranks hand in, number by number. Collective: all ranks must call. Raises
        LostPeer."""
        if self._group is None:
            return mine
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(mine, dtype=torch.int64)
        with _peers_present("comparing numbers"):
            dist.all_reduce(numbers, op=dist.ReduceOp.MIN, group=self._group)
        return numbers.tolist()

    def conclude(self) -> Stop | None:
        """The agreed value of the last edge, for a loop that came to its end: a verdict still counts there, a wish to
        stop does not. Collective: all ranks must call."""
        agreed = self._collect()
        return agreed if agreed is not None and agreed.reason >= StopReason.DATA_STARVED else None

    def gather(self, mine: Any) -> list[Any]:
        """What every rank hands in, by rank. Collective: all ranks must call. Raises LostPeer."""
        if self._group is None:
            return [mine]
        import torch.distributed as dist

        self._collect()
        everyone: list[Any] = [None] * dist.get_world_size()
        with _peers_present("the last exchange"):
            dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def barrier(self) -> None:
        """Wait for all ranks: after it, everything a rank wrote before it is written. Raises LostPeer."""
        if self._group is None:
            return
        import torch.distributed as dist

        self._collect()
        with _peers_present("the last barrier"):
            dist.barrier(group=self._group)


@contextlib.contextmanager
def _peers_present(doing: str) -> Any:
    try:
        yield
    except RuntimeError as error:
        raise LostPeer(f"a rank stopped answering while {doing}: {error}") from error


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error that came out of any collective means that another process is gone.

    Neither gloo nor NCCL has an error type for it, only the text.
    """
    if isinstance(error, LostPeer):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_A_LOST_PEER)


def worker_signals() -> None:
    """For `worker_init_fn` of a data loader: its processes leave stopping to the rank that started them.

    Slurm, the launcher and a terminal send signals to every process of a job. A worker that died of one would end the
    rank before it has saved. SIGUSR1, SIGINT and SIGHUP are ignored; after SIGTERM a worker ends by itself
    `WORKER_GRACE_S` seconds later.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE_S))
