"""One program at a time in a run directory: two would move each other's records and remove each other's unfinished
checkpoints.

A POSIX lock keeps others out where the file system has locks that all nodes share. Many have none, or only local ones
(NFS with `nolock`), and the lock of a node that went down may stay. So the lock's file also says who holds it, and the
holder touches it every few seconds: whether a process of this node lives is seen in /proc, whether one elsewhere does
by its touches.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from d2v_scale.errors import UserError
from d2v_scale.process.started import RESTART
from d2v_scale.programs.machine import this_system

LOCK_FILE = ".lock"
LOCK_WAIT_S = 30.0
"""For a run that was just killed to be gone, and for a holder on another node to show that it lives."""
DYING_WAIT_S = 300.0
"""For an earlier attempt of the same Slurm job, which still saves."""
BEAT_S = 5.0
SILENT_S = 20.0
"""A holder on another node that does not touch the file for so long is gone."""
OLD_S = 600.0
"""So old a touch needs no watching, however wrong the nodes' clocks are."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """A process that may write to a run directory."""

    pid: int
    host: str
    started: int
    """Clock ticks after the boot; numbers of processes are given again."""
    machine: str
    """The boot and the process namespace in which `pid` and `started` mean something."""
    job: str
    restart: str
    token: str

    @classmethod
    def this_process(cls) -> "Holder":
        pid, job = os.getpid(), os.environ.get("SLURM_JOB_ID", "")
        restart = f"{os.environ.get('SLURM_RESTART_COUNT', '0')}.{os.environ.get(RESTART, '0')}"
        return cls(pid, os.uname().nodename, _started(pid) or 0, this_system(), job, restart, uuid.uuid4().hex)

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"

    @property
    def is_near(self) -> bool:
        """Whether this node's /proc knows it. Without a /proc here nothing is known of anybody."""
        return self.machine == this_system() != ""

    @property
    def lives(self) -> bool:
        """Whether the process of this node is there. False for one that has ended and is only not waited for."""
        return self.is_near and _started(self.pid) == self.started

    def is_process_of(self, other: "Holder") -> bool:
        return (self.pid, self.started, self.machine) == (other.pid, other.started, other.machine)

    def is_earlier_attempt_of(self, other: "Holder") -> bool:
        return bool(self.job) and self.job == other.job and self.restart != other.restart


def _started(pid: int) -> int | None:
    """When a process started; None for one that is not there or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


class _Watch:
    """Sees whether a holder on another node touches the file."""

    def __init__(self) -> None:
        self._touched = self._since = -1.0

    def is_silent(self, touched: float) -> bool:
        now = time.monotonic()
        if touched != self._touched:
            first = self._touched < 0
            self._touched, self._since = touched, now
            if first and time.time() - touched > OLD_S:
                self._since = now - SILENT_S
        return now - self._since >= SILENT_S


class _Held:
    """The lock that this process has."""

    def __init__(self, file: int, me: Holder) -> None:
        self._file, self._me = file, me
        os.ftruncate(file, 0)
        os.pwrite(file, f"{me}\n{json.dumps(asdict(me))}\n".encode(), 0)
        self._end = threading.Event()
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(self._file)

    def release(self) -> None:
        self._end.set()
        with contextlib.suppress(OSError):
            if self._me.token in os.pread(self._file, 4096, 0).decode(errors="replace"):
                os.ftruncate(self._file, 0)
            os.close(self._file)


def _is_gone(holder: Holder, watch: _Watch, touched: float) -> bool:
    return not holder.lives if holder.is_near else watch.is_silent(touched)


_held: list[_Held] = []


def lock(run_dir: Path, wait_s: float = LOCK_WAIT_S) -> None:
    """Keep other programs out of the run directory until `release`, or as long as this process lives. Rank 0.

    Raises UserError if another one is still there after `wait_s`; for an earlier attempt of the same Slurm job, which
    may be saving, the wait is longer. A holder that does not live any more is passed over, but for one of another node
    and job whose lock the file system still keeps: nobody here can know.
    """
    path, me, watch = run_dir / LOCK_FILE, Holder.this_process(), _Watch()
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    began = time.monotonic()
    while True:
        # Before the lock is tried: closing the file again would give it up.
        holder, text, touched = _read(path)
        granted = _try(file, run_dir)
        silent = holder is None or holder.is_process_of(me) or _is_gone(holder, watch, touched)
        if granted is not False and silent:
            break
        if granted is False and silent and holder is not None and not holder.is_near and holder.job == me.job != "":
            log.warning("%s is still locked by an earlier attempt of this job, %s, which is gone.", run_dir, holder)
            break
        if granted:
            fcntl.lockf(file, fcntl.LOCK_UN)
        dying = holder is not None and holder.is_earlier_attempt_of(me)
        if time.monotonic() - began >= (max(wait_s, DYING_WAIT_S) if dying else wait_s):
            os.close(file)
            raise _taken(run_dir, holder, text)
        time.sleep(0.5)
    held = _Held(file, me)
    if granted is None:
        time.sleep(1)  # who came at the same moment has written as well: the last one has it
        holder, text, _ = _read(path)
        if holder is not None and holder.token != me.token:
            held.release()
            raise _taken(run_dir, holder, text)
    _held.append(held)


def release() -> None:
    """Let the next program in without waiting; the last thing a run does. No effect where nothing is locked."""
    while _held:
        _held.pop().release()


def _taken(run_dir: Path, holder: Holder | None, text: str) -> UserError:
    remedy = "Wait for its end or stop it."
    if holder is not None and not holder.is_near:
        remedy += f" If {holder.host} is down, remove {run_dir / LOCK_FILE}."
    return UserError(f"Another program trains in {run_dir}: {text or 'it has just started'}", remedy)


def _try(file: int, run_dir: Path) -> bool | None:
    """Whether the file system gives the lock; None where it has none to give."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        log.warning("%s cannot be locked (%s): only what its lock file says keeps others out.", run_dir, error)
        return None
    return True


def _read(path: Path) -> tuple[Holder | None, str, float]:
    """Who holds it, in words, and when the file was touched. No holder in what an earlier version wrote, which did not
    touch its file: there the lock alone counts."""
    # Opened anew each time, so that a network file system asks its server.
    with path.open("rb") as file:
        first, _, rest = file.read(4096).decode(errors="replace").partition("\n")
        touched = os.fstat(file.fileno()).st_mtime
    try:
        return Holder(**json.loads(rest)), first, touched
    except (ValueError, TypeError):
        return None, re.sub(r"\s+", " ", first).strip(), touched
