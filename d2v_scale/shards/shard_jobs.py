"""One shard's worth of work per job, in several processes, skipping what an interrupted run finished."""

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from d2v_scale.files import atomic_file

_IN_FLIGHT = 4
_REPORT_EVERY = 10
_REPORT_EVERY_S = 30.0


@dataclass
class Part:
    """What became of a job; kept as a small JSON file until the inputs change."""

    digest: str
    """Of the job's inputs."""
    entry: dict[str, Any]
    """The shard's `ShardEntry`."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Files left out, with the reason."""
    extensions: list[str] = field(default_factory=list)
    classes: int = 0
    """Highest label + 1."""
    odd_labels: int = 0
    """Labels that are no class numbers."""
    odd_label: str = ""
    """What is wrong with the first of them."""
    layouts: dict[str, int] = field(default_factory=dict)
    """How many arrays have each number of channels and axes, in words."""
    was_there: bool = False
    """An earlier run did it; false in the file."""


class Job(Protocol):
    """Work on one shard."""

    @property
    def record(self) -> Path:
        """Where its `Part` is kept."""

    def digest(self) -> str:
        """Of everything the result depends on."""

    def is_done(self) -> bool:
        """True when what it writes is there and complete."""

    def run(self) -> Part:
        """Do the work."""


AnyJob = TypeVar("AnyJob", bound=Job)


def finish(job: Job) -> Part:
    """The job's part: from an earlier run with the same inputs, or from doing it now."""
    digest = job.digest()
    if (part := earlier(job, digest)) is not None:
        return part
    part = job.run()
    part.digest = digest
    with atomic_file(job.record) as temporary:
        temporary.write_text(json.dumps(asdict(part)))
    return part


def earlier(job: Job, digest: str) -> Part | None:
    """What an earlier run with the same inputs made of the job; None: it did not end it."""
    if not job.record.is_file() or not job.is_done():
        return None
    part = Part(**json.loads(job.record.read_text()))
    part.was_there = True
    return part if part.digest == digest else None


class _Progress:
    """What has been done, how fast, and how long the rest takes."""

    def __init__(self, total: int | None) -> None:
        """`total`: samples of all jobs; None: nobody knows."""
        self._total = total
        self._began = self._said = time.monotonic()
        self._shards = self._samples = self._skipped = self._new = self._there = 0

    def add(self, part: Part) -> str:
        """A line on all that has been done, this part included."""
        if part.entry:
            count = part.entry["samples"] + len(part.skipped)
            self._shards += 1
            self._samples += count
            self._skipped += len(part.skipped)
            self._there += part.was_there
            self._new += 0 if part.was_there else count
        return self.line()

    def line(self) -> str:
        """What has been done up to now."""
        of = f" of {self._total:,} ({self._samples / self._total:.0%})" if self._total else ""
        parts = [f"{self._shards} shards, {self._samples:,}{of} samples"]
        if self._there:
            parts.append(f"{self._there} shards were there")
        seconds = time.monotonic() - self._began
        if self._new and seconds > 0:
            rate = self._new / seconds
            parts.append(f"{rate:.3g} a second")
            if self._total and self._total > self._samples:
                parts.append(f"{_duration((self._total - self._samples) / rate)} left")
        return ", ".join([*parts, f"{self._skipped} skipped"])

    def is_due(self) -> bool:
        """Whether a line should be printed where there is no terminal: every ten shards, and every half minute."""
        now = time.monotonic()
        due = self._shards % _REPORT_EVERY == 0 or now - self._said > _REPORT_EVERY_S
        self._said = now if due else self._said
        return due


def _duration(seconds: float) -> str:
    minutes, hours = round(seconds / 60), seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{hours:.1f} h"


def run_all(
    jobs: Iterable[AnyJob],
    processes: int,
    function: Callable[[AnyJob], Part] = finish,
    total: int | None = None,
) -> list[Part]:
    """Finish all jobs, reading them only a little ahead, with a line of progress at a terminal, and lines elsewhere;
    parts in their order. `total`: samples of all jobs, where it is known."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    numbered = enumerate(jobs)
    parts: dict[int, Part] = {}
    done_so_far = _Progress(total)
    with (
        ProcessPoolExecutor(processes) as pool,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("", total=None)
        waiting: dict[Future[Part], int] = {}
        try:
            while True:
                for number, job in itertools.islice(numbered, max(0, _IN_FLIGHT * processes - len(waiting))):
                    waiting[pool.submit(function, job)] = number
                if not waiting:
                    break
                for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                    part = parts[waiting.pop(done)] = done.result()
                    line = done_so_far.add(part)
                    progress.update(task, description=line)
                    if not console.is_terminal and done_so_far.is_due():
                        print(line, file=sys.stderr)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [parts[number] for number in sorted(parts)]
