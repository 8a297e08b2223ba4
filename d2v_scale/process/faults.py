"""Named points where a test can make a run die or fail.

`D2V_FAULT=point:rank:nth[:kind]` strikes the `nth` time (from 1) that `rank` passes `point`. Kinds: `kill` (SIGKILL,
the default), `raise` (RuntimeError), `enospc` (OSError, disk full), `slow:SECONDS` (a delay, then and every time
after). Several faults are separated by commas.
"""

import errno
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import Literal, get_args

Point = Literal[
    "forward",
    "backward",
    "optimizer",
    "ema",
    "snapshot",
    "shard_write",
    "manifest",
    "rename",
    "marker",
    "retention",
    "memory_write",
    "memory_send",
    "data",
]


@dataclass
class _Fault:
    point: str
    rank: int
    nth: int
    kind: str
    seconds: float = 0.0
    passed: int = 0


def _parse(text: str) -> list[_Fault]:
    faults = []
    for part in filter(None, text.split(",")):
        point, rank, nth, *kind = part.split(":")
        if point not in get_args(Point):
            raise ValueError(f"D2V_FAULT: unknown point {point!r}; known: {', '.join(get_args(Point))}")
        seconds = float(kind[1]) if len(kind) > 1 else 0.0
        faults.append(_Fault(point, int(rank), int(nth), kind[0] if kind else "kill", seconds))
    return faults


_faults: list[_Fault] = []
_lock = threading.Lock()


def arm(text: str) -> None:
    """Replace the faults by those in `text` (the format of D2V_FAULT)."""
    _faults[:] = _parse(text)


arm(os.environ.get("D2V_FAULT", ""))


def point(name: Point) -> None:
    """Pass the point `name`. Does nothing unless D2V_FAULT names it, this rank and this passage. Thread-safe."""
    if not _faults:
        return
    rank = int(os.environ.get("RANK", "0"))
    with _lock:
        struck = []
        for fault in _faults:
            if fault.point == name and fault.rank == rank:
                fault.passed += 1
                if fault.passed == fault.nth or (fault.kind == "slow" and fault.passed > fault.nth):
                    struck.append(fault)
    for fault in struck:
        if fault.kind == "slow":
            time.sleep(fault.seconds)
            continue
        if fault.kind == "enospc":
            raise OSError(errno.ENOSPC, f"No space left on device (injected at {name})")
        if fault.kind == "raise":
            raise RuntimeError(f"fault injected at {name}")
        os.kill(os.getpid(), signal.SIGKILL)
