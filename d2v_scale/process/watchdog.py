"""Ends a run in which nothing moves any more, and says which rank is to blame.

One stopped process makes all others wait for ever inside a collective. Every rank has a watchdog thread; the training
loop tells it at each step edge that the run moves. When it has not moved for the limit, each rank that still lives
writes the stacks of its threads to `logs/hang-<start>/rank-<rank>.txt`. Ranks without such a file are the silent ones;
a live rank on the same host looks up their process state. The lowest live rank puts it together in status.json, and
all of them exit with the requeue code.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from d2v_scale.errors import EXIT_REQUEUE
from d2v_scale.process.status import read_status, write_status

_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "in uninterruptible sleep (waiting for a disk or a network file system)",
    "T": "stopped (SIGSTOP)",
    "t": "stopped by a debugger",
    "Z": "dead, not yet collected",
    "I": "idle",
}

STARTUP_LIMIT_S = 1800.0
"""Longest time until the first step edge."""
_LONGEST_SETTLE_S = 15.0
_REPORT_S = 8 * _LONGEST_SETTLE_S
"""Within which the report is written and all ranks have left, with as much again for a slow file system."""


def collective_timeout_s(limit_s: float, longest_phase_s: float = 0.0) -> float:
    """How long a rank has to wait for another in a collective, in seconds, so that the watchdog speaks first.

    `limit_s` as for `Watchdog`; `longest_phase_s`: the most that any phase is allowed (`Watchdog.allow`).
    """
    return max(limit_s, longest_phase_s, STARTUP_LIMIT_S) + _REPORT_S


@dataclass(frozen=True)
class Peer:
    """Where one rank runs. `started`: the process's start time in clock ticks since boot, against reused ids."""

    rank: int
    host: str
    pid: int
    started: int

    def state(self) -> str:
        """The process state in words. Only meaningful on the peer's own host."""
        stat = _proc_stat(self.pid)
        if stat is None or int(stat[19]) != self.started:
            return "gone"
        return f"{_STATES.get(stat[0], 'unknown')}, state {stat[0]}"


class Watchdog:
    """Watches this rank's progress from a thread. Use as a context manager around the training loop."""

    def __init__(
        self,
        run_dir: str | Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        limit_s: float,
        startup_limit_s: float = STARTUP_LIMIT_S,
    ) -> None:
        """Collective: all ranks must call, after torch.distributed is initialised if there is more than one.

        `limit_s`: longest time in seconds between two beats; `startup_limit_s`: the same until the first beat.
        """
        assert limit_s > 0
        self.run_dir = Path(run_dir)
        self.rank = rank
        self.world_size = world_size
        self.limit_s = limit_s
        self._allowed_s = max(startup_limit_s, limit_s)
        self._phase = "start-up"
        self._step: int | None = None
        self._last_beat = time.monotonic()
        self._closed = threading.Event()
        host = os.environ.get("SLURMD_NODENAME", socket.gethostname())  # the name that Slurm's commands take
        with contextlib.suppress(ValueError, OSError, AttributeError):  # stderr may have no file descriptor
            faulthandler.register(signal.SIGQUIT, file=sys.stderr, all_threads=True)
        mine = Peer(rank, host, os.getpid(), _started(os.getpid()))
        self.peers, begun = _exchange(mine, world_size)
        self.hang_dir = self.run_dir / "logs" / f"hang-{begun}"
        # Long enough for every rank's thread to notice, as their last beats lie within one step of each other.
        self._settle_s = min(_LONGEST_SETTLE_S, max(1.0, limit_s / 4))
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()

    def beat(self, step: int) -> None:
        """The run moves: `step` optimizer steps are complete. Costs nothing."""
        self._step, self._phase, self._allowed_s = step, "training", self.limit_s
        self._last_beat = time.monotonic()

    @contextlib.contextmanager
    def allow(self, seconds: float, phase: str) -> Iterator[None]:
        """A phase that may take up to `seconds`, such as a checkpoint. All ranks must enter it, or the others fire."""
        before = (self._phase, self._allowed_s)
        self._last_beat = time.monotonic()
        self._phase, self._allowed_s = phase, max(seconds, self.limit_s)
        try:
            yield
        finally:
            self._phase, self._allowed_s = before
            self._last_beat = time.monotonic()

    def _watch(self) -> None:
        tick_s = min(1.0, self.limit_s / 10)
        previous = time.monotonic()
        while not self._closed.wait(tick_s):
            now = time.monotonic()
            if now - previous > 5 * tick_s + 5:
                self._last_beat = now  # this process itself was stopped; time it did not live through does not count
            previous = now
            if now - self._last_beat > self._allowed_s:
                self._end_the_run(now - self._last_beat)

    def _end_the_run(self, silent_for_s: float) -> None:
        try:
            self._report(silent_for_s)
        except OSError as error:
            print(f"watchdog: could not report: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_REQUEUE)

    def _report(self, silent_for_s: float) -> None:
        self.hang_dir.mkdir(parents=True, exist_ok=True)
        me = self.peers[self.rank]
        head = f"rank {self.rank} (process {me.pid} on {me.host}): {self._phase}, step {self._step}, "
        head += f"no progress for {silent_for_s:.0f} s"
        print(f"watchdog: {head}", file=sys.stderr, flush=True)
        partial = self.hang_dir / f".rank-{self.rank:05d}.txt"
        with partial.open("w") as file:
            file.write(head + "\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        partial.replace(self.hang_dir / f"rank-{self.rank:05d}.txt")

        time.sleep(self._settle_s)
        self._describe_silent_neighbours(me.host)
        time.sleep(self._settle_s / 2)
        live = self._live_ranks()
        if self.rank == min(live, default=self.rank):
            reason = self._reason(live, silent_for_s)
            print(f"watchdog: {reason}", file=sys.stderr, flush=True)
            write_status(self.run_dir, EXIT_REQUEUE, reason, self._step)
            return
        give_up = time.monotonic() + 2 * self._settle_s
        while read_status(self.run_dir) is None and time.monotonic() < give_up:
            time.sleep(0.2)

    def _live_ranks(self) -> set[int]:
        return {int(path.stem.split("-")[1]) for path in self.hang_dir.glob("rank-*.txt")}

    def _describe_silent_neighbours(self, host: str) -> None:
        live = self._live_ranks()
        for peer in self.peers:
            if peer.rank in live or peer.host != host:
                continue
            state = peer.state()
            (self.hang_dir / f"silent-{peer.rank:05d}.json").write_text(json.dumps(state))
            if state.startswith((_STATES["R"], _STATES["S"])):
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGQUIT)  # its Python threads are stuck; this still prints their stacks

    def _reason(self, live: set[int], silent_for_s: float) -> str:
        silent = [peer for peer in self.peers if peer.rank not in live]
        seen = f"no progress for {silent_for_s:.0f} s ({self._phase}, step {self._step}); stacks in {self.hang_dir}"
        if not silent:
            return f"all ranks live but wait: {seen}"
        named = "; ".join(self._name(peer) for peer in silent[:8])
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        return f"silent: {named}{more}: {seen}"

    def _name(self, peer: Peer) -> str:
        try:
            state = json.loads((self.hang_dir / f"silent-{peer.rank:05d}.json").read_text())
        except (OSError, ValueError):
            state = "no live rank on its host to look at it"
        return f"rank {peer.rank} (process {peer.pid} on {peer.host}) is {state}"


def _exchange(mine: Peer, world_size: int) -> tuple[list[Peer], str]:
    """All ranks' whereabouts and rank 0's start time. Collective."""
    begun = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    if world_size == 1:
        return [mine], begun
    import torch.distributed as dist

    everyone: list[tuple[Peer, str] | None] = [None] * world_size
    dist.all_gather_object(everyone, (mine, begun))
    found = [one for one in everyone if one is not None]
    assert [peer.rank for peer, _ in found] == list(range(world_size))
    return [peer for peer, _ in found], found[0][1]


def _proc_stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third (state) on; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _started(pid: int) -> int:
    stat = _proc_stat(pid)
    assert stat is not None
    return int(stat[19])
