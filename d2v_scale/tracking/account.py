"""Where a run's time went: every second between its first process and its last line has a name.

A pure function of timeline.jsonl, attempts.jsonl and status.json. By attempt, in seconds:

    productive   training whose result the run still has (all of a step but what stands below)
    repeated     training that a later attempt, or the same after a rewind, did again
    restart      from the last sign of an attempt that failed to the processes of the next: noticing, ending, starting;
                 and going back inside the process, the wait for a checkpoint in the making included
    held         between attempts, where nobody was at it: a queue, or a run that was stopped and not yet continued
    start_up     from the first process to the first step, that step included, for which kernels are built
    data         waiting for a batch
    evaluation   measuring and making pictures
    checkpoint   held up by checkpoints, the last one's writing included
    ending       from the last step to the last line: what ranks tell each other, verdict, MLflow
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2v_scale.process.status import ATTEMPTS_FILE, read_status
from d2v_scale.tracking.timeline import TIMELINE_FILE

KINDS = (
    *("productive", "repeated", "restart", "held", "start_up"),
    *("data", "evaluation", "checkpoint", "ending"),
)


@dataclass
class Attempt:
    """One start of the run's processes, and what went before it since the last one."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    """By `KINDS`."""
    first: int = 0
    """Steps that were done when it began."""
    last: int = 0
    """Steps that were done at its last line."""
    code: int | None = None
    """Its exit code; None: it has not told one."""
    excluded: Sequence[str] = ()
    """Nodes of its job whose places spare ones had taken."""

    @property
    def wall(self) -> float:
        """Seconds from the last attempt's end to this one's."""
        return sum(self.seconds.values())


@dataclass
class _Trained:
    """Training between two lines."""

    attempt: Attempt
    first: int
    last: int
    seconds: float


class _Reader:
    """Goes through the lines in their order."""

    def __init__(self, decided: Sequence[float]) -> None:
        self.attempts: list[Attempt] = []
        self.now = 0.0
        """The time up to which every second has its name."""
        self._decided = decided
        self._spent: dict[str, float] = {}
        self._trains = False
        self._trained: list[_Trained] = []

    def begin(self, line: dict[str, Any]) -> None:
        attempt = Attempt(first=line["resumed"], last=line["resumed"], excluded=line.get("excluded", ()))
        if self.attempts:
            self._between(attempt, line)
        self.now = max(self.now, line["started"])
        self.attempts.append(attempt)
        self._spent, self._trains = {}, False
        self.back_to(line["resumed"])

    def _between(self, attempt: Attempt, line: dict[str, Any]) -> None:
        """Name the time since the last attempt."""
        until = max(self.now, line["started"])
        gap = until - self.now
        decided = max((t for t in self._decided if self.now <= t <= until), default=None)
        allocated = line.get("allocated")
        if line.get("restart"):
            held = 0.0
        elif decided is None:  # by hand, or a lost node's job that Slurm took back by itself
            held = min(until, allocated) - self.now if allocated and allocated > self.now else gap
        else:
            # Without Slurm nobody was at it from the decision on: whoever started it by hand came when they came.
            held = max(0.0, (min(until, allocated) if allocated else until) - decided)
        attempt.seconds["held"] += held
        attempt.seconds["restart"] += gap - held

    def back_to(self, step: int) -> None:
        """Training goes on after this step: what was done behind it is done again."""
        for one in self._trained:
            if one.last > step:
                share = (one.last - max(step, one.first)) / (one.last - one.first)
                moved = share * one.seconds
                one.attempt.seconds["productive"] -= moved
                one.attempt.seconds["repeated"] += moved
                one.seconds -= moved
                one.last = max(step, one.first)
        self._trained = [one for one in self._trained if one.last > one.first]

    def at(self, line: dict[str, Any]) -> None:
        attempt, rest = self.attempts[-1], max(0.0, line["time"] - self.now)
        for kind in ("evaluation", "checkpoint", "data"):
            if kind == "data" and not self._trains:
                continue  # the first batch waits for workers that are being started
            grown = line["spent"].get(kind, 0.0) - self._spent.get(kind, 0.0)
            named = min(rest, max(0.0, grown))
            attempt.seconds[kind] += named
            rest -= named
        steps = line["step"] - attempt.last
        if not self._trains:
            attempt.seconds["start_up"] += rest
        elif steps > 0:
            attempt.seconds["productive"] += rest
            self._trained.append(_Trained(attempt, attempt.last, line["step"], rest))
        else:
            attempt.seconds["ending"] += rest
        self._trains |= steps > 0
        self._spent, attempt.last = line["spent"], line["step"]
        self.now = max(self.now, line["time"])

    def rewound(self, line: dict[str, Any]) -> None:
        attempt = self.attempts[-1]
        attempt.seconds["restart"] += max(0.0, line["time"] - self.now)
        self.now = max(self.now, line["time"])
        self.back_to(line["step"])
        attempt.last = line["step"]

    def end(self, line: dict[str, Any]) -> None:
        # One that took no step failed while it started.
        self.attempts[-1].seconds["ending" if self._trains else "start_up"] += max(0.0, line["time"] - self.now)
        self.attempts[-1].code = line["code"]
        self.now = max(self.now, line["time"])


def account(lines: Iterable[dict[str, Any]], decided: Sequence[float] = (), last_word: float = 0.0) -> list[Attempt]:
    """Of the lines of a timeline, in their order: what every second went into, by attempt. Pure.

    `decided`: when a job's script had seen an attempt end (Unix seconds). `last_word`: when the run said how it ended,
    which a watchdog does long after the last line.
    """
    reader = _Reader(decided)
    for line in lines:
        if line["event"] == "begin":
            reader.begin(line)
        elif reader.attempts:
            getattr(reader, line["event"])(line)
    if reader.attempts and reader.attempts[-1].code is None:
        reader.attempts[-1].seconds["restart"] += max(0.0, last_word - reader.now)
    return reader.attempts


def read_account(run_dir: Path) -> list[Attempt]:
    """The account of a run directory; empty where no timeline is kept there."""
    status = read_status(run_dir)
    decided = [line["time"] for line in _lines(run_dir / ATTEMPTS_FILE) if "time" in line]
    last_word = status.time if status is not None and status.outcome != "done" else 0.0
    known = [line for line in _lines(run_dir / TIMELINE_FILE) if line.get("event") in ("begin", "at", "rewound", "end")]
    return account(known, decided, last_word)


def totals(attempts: Iterable[Attempt]) -> dict[str, float]:
    """Seconds of all attempts, by kind."""
    return {kind: sum(attempt.seconds[kind] for attempt in attempts) for kind in KINDS}


def told(attempts: Sequence[Attempt]) -> list[str]:
    """The account in a line; none where there is nothing to tell."""
    seconds = totals(attempts)
    wall = sum(seconds.values())
    if not wall:
        return []
    others = sorted((kind for kind in KINDS[1:] if seconds[kind] >= 0.0005 * wall), key=lambda kind: -seconds[kind])
    lost = ", ".join(f"{words(kind)} {seconds[kind] / wall:.1%}" for kind in others)
    tries = f" in {len(attempts)} attempts" if len(attempts) > 1 else ""
    productive = f"{seconds['productive'] / wall:.1%} productive of {duration(wall)}"
    return [f"Time: {productive}{tries}{f'; {lost}' if lost else ''}"]


def rows(attempts: Sequence[Attempt]) -> list[list[str]]:
    """The account as a table, its head first: a row an attempt, then all of them, then their shares of the wall time.
    Kinds that nothing went into are left out."""
    of_all = totals(attempts)
    kinds, wall = [kind for kind in KINDS if of_all[kind] > 0], sum(of_all.values())
    found = [["attempt", "steps", *(words(kind) for kind in kinds), "wall"]]
    for number, one in enumerate(attempts, 1):
        seconds = [duration(one.seconds[kind]) for kind in kinds]
        found.append([str(number), f"{one.first} to {one.last}", *seconds, duration(one.wall)])
    if len(attempts) > 1:
        found.append(["all", "", *(duration(of_all[kind]) for kind in kinds), duration(wall)])
    return [*found, ["share", "", *(f"{of_all[kind] / wall:.1%}" for kind in kinds), ""]] if wall else []


def account_table(attempts: Sequence[Attempt]) -> str:
    """The account as a table in Markdown; empty where there is nothing to tell."""
    lines = [f"| {' | '.join(row)} |" for row in rows(attempts)]
    return "\n".join([*lines[:1], "|---" * lines[0].count(" | ") + "|---|", *lines[1:]]) if lines else ""


def words(kind: str) -> str:
    """A kind as a person reads it."""
    named = {"start_up": "start-up", "data": "waiting for data", "checkpoint": "checkpoints"}
    return named.get(kind, kind)


def duration(seconds: float) -> str:
    """As a person reads it."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; one cut off by a crash is left out."""
    found = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found
