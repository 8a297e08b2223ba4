"""timeline.jsonl: when a run did what, over all its attempts, for `tracking.account`. Written by rank 0, only added to.

Every line has `event` and `time` (Unix seconds):

    begin    an attempt has its model and data, and trains next. `started`: when its processes were started;
             `allocated`: when Slurm gave it its nodes (null without); `restart`: its number among the attempts that
             followed a fault without leaving the job, 0 for others; `resumed`: the step that it continues after;
             `excluded`: the nodes of the job whose places spare ones have taken
    at       `step` steps are done; `spent`: seconds of this process so far, by what it waited for
    rewound  training goes on after `step`, an earlier one
    end      the attempt is over, with exit code `code`

What an attempt that was killed has done since its last line is not known. That is a second, or a thousandth of the
attempt where that is more: a line is written when so much time has passed, and at every evaluation and checkpoint.
"""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2v_scale.files import append_line
from d2v_scale.process.started import RESTART, excluded, number, started

TIMELINE_FILE = "timeline.jsonl"
_LEAST_S = 1.0
_SHARE = 1e-3


class Timeline:
    """The lines of one attempt. Nothing is raised where the file takes none: the account has a gap then."""

    def __init__(self, run_dir: Path, resumed: int) -> None:
        """`resumed`: the step that training continues after."""
        self._run_dir, self._resumed = run_dir, resumed
        self._began, self._written = time.monotonic(), float("-inf")
        """The second: when the newest `at` was written. By a clock that nobody sets."""
        self._spent: dict[str, float] = {}
        self._step = resumed
        add(
            run_dir,
            "begin",
            started=started(),
            allocated=number("SLURM_JOB_START_TIME"),
            restart=int(number(RESTART) or 0),
            resumed=resumed,
            excluded=sorted(excluded()),
        )

    def at(self, step: int, spent: Mapping[str, float]) -> None:
        """`step` steps are done, and this process has spent so many seconds, by what on. Cheap at every step."""
        now = time.monotonic()
        grown = any(seconds != self._spent.get(kind, 0.0) for kind, seconds in spent.items() if kind != "data")
        due = now - self._written >= max(_LEAST_S, _SHARE * (now - self._began))
        self._step = step
        if due or grown:
            self._spent, self._written = dict(spent), now
            add(self._run_dir, "at", step=step, spent={kind: round(value, 4) for kind, value in spent.items()})

    def ends(self, spent: Mapping[str, float]) -> None:
        """Training is over; what follows is the attempt's end."""
        self._written = float("-inf")
        self.at(self._step, spent)

    def end(self, code: int) -> None:
        """The attempt is over, with this exit code."""
        add(self._run_dir, "end", code=code)

    def rewinds(self, step: int, spent: Mapping[str, float]) -> None:
        """`step` steps are done, and the run begins to go back."""
        self._step = step
        self.ends(spent)

    def rewound(self, step: int) -> None:
        """Training goes on after an earlier step."""
        self._step = step
        add(self._run_dir, "rewound", step=step)


def add(run_dir: Path, event: str, **content: Any) -> None:
    """One line. A disk that takes none is passed over."""
    with contextlib.suppress(OSError):
        append_line(run_dir / TIMELINE_FILE, {"event": event, "time": round(time.time(), 3), **content})
