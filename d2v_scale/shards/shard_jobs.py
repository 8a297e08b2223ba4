"""One shard's worth of work per job, in several processes, skipping what an interrupted run finished."""

import itertools
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from d2v_scale.files import atomic_file

_IN_FLIGHT = 4
_REPORT_EVERY = 10


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
    if job.record.is_file() and job.is_done():
        part = Part(**json.loads(job.record.read_text()))
        if part.digest == digest:
            return part
    part = job.run()
    part.digest = digest
    with atomic_file(job.record) as temporary:
        temporary.write_text(json.dumps(asdict(part)))
    return part


def run_all(jobs: Iterable[AnyJob], processes: int, function: Callable[[AnyJob], Part] = finish) -> list[Part]:
    """Finish all jobs, reading them only a little ahead, with a progress bar at a terminal; parts in their order."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), TimeElapsedColumn())
    numbered = enumerate(jobs)
    parts: dict[int, Part] = {}
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
                    parts[waiting.pop(done)] = done.result()
                    line = _progress(list(parts.values()))
                    progress.update(task, description=line)
                    if not console.is_terminal and len(parts) % _REPORT_EVERY == 0:
                        print(line, file=sys.stderr)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [parts[number] for number in sorted(parts)]


def _progress(parts: list[Part]) -> str:
    samples = sum(part.entry["samples"] for part in parts)
    return f"{len(parts)} shards, {samples} samples, {sum(len(part.skipped) for part in parts)} skipped"
