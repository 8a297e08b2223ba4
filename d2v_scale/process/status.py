"""status.json: a run's own word on how it ended.

Exit codes pass through a launcher, srun and the batch shell, and are not reliable on the way; the file is. A run
directory without the file belongs to a run that is still going or has lost a process.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from d2v_scale.errors import EXIT_DONE, EXIT_LOST_PEER, EXIT_REQUEUE
from d2v_scale.files import write_whole
from d2v_scale.process.started import excluded
from d2v_scale.redaction import redact

Outcome = Literal["done", "requeue", "failed"]

STATUS_FILE = "status.json"
ATTEMPTS_FILE = "attempts.jsonl"
"""Beside it: a line for every attempt that a job's script or launcher saw end."""
_RESERVE_FILE = ".status_reserve"
_RESERVE_BYTES = 64 * 1024


@dataclass(frozen=True)
class Status:
    """How a run ended. `step`: completed optimizer steps in the newest checkpoint or at the end; None if unknown."""

    outcome: Outcome
    exit_code: int
    reason: str
    step: int | None = None
    time: float = 0.0
    verdict: str = ""
    """What the record says of the run's health, in a sentence; empty where nobody judged."""
    result: Sequence[str] = ()
    """What the run is worth, in lines as at the terminal."""
    next: Sequence[str] = ()
    """Commands that go on from here, the likeliest first."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Nodes of the job whose places spare ones took, and why."""

    def __post_init__(self) -> None:
        assert self.outcome in get_args(Outcome), self.outcome


def outcome_of(exit_code: int) -> Outcome:
    """done for 0, requeue for what another attempt may cure (a stop, a lost peer), failed for everything else."""
    if exit_code == EXIT_DONE:
        return "done"
    return "requeue" if exit_code in (EXIT_REQUEUE, EXIT_LOST_PEER) else "failed"


def begin(run_dir: str | Path) -> None:
    """Forget an earlier attempt's status and set 64 KiB aside, so that a full disk can still be reported. Rank 0."""
    directory = Path(run_dir)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / STATUS_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (directory / _RESERVE_FILE).write_bytes(os.urandom(_RESERVE_BYTES))


def write_status(
    run_dir: str | Path,
    exit_code: int,
    reason: str,
    step: int | None = None,
    verdict: str = "",
    *,
    result: Sequence[str] = (),
    next_commands: Sequence[str] = (),
) -> Status:
    """Write status.json (atomically, synced to disk) and return what stands in it.

    On an agreed end rank 0 calls it after the last barrier. A rank that fails alone calls it at once; the cause counts
    for more than its consequence, so a status that only says "lost peer" or "no progress" gives way to any other, and
    never replaces one. Raises OSError if the directory takes no file at all.
    """
    directory = Path(run_dir)
    commands = [redact(command) for command in next_commands]
    status = Status(
        outcome_of(exit_code),
        exit_code,
        redact(reason),
        step,
        time.time(),
        verdict,
        list(result),
        commands,
        excluded(),
    )
    earlier = read_status(directory)
    if earlier is not None and _weight(earlier) >= _weight(status):
        return earlier
    text = json.dumps(asdict(status), indent=1) + "\n"
    try:
        write_whole(directory / STATUS_FILE, text)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        (directory / _RESERVE_FILE).unlink(missing_ok=True)
        write_whole(directory / STATUS_FILE, text)
    (directory / _RESERVE_FILE).unlink(missing_ok=True)
    return status


def read_status(run_dir: str | Path) -> Status | None:
    """The status of a finished run; None if there is none or it cannot be read."""
    try:
        return Status(**json.loads((Path(run_dir) / STATUS_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _weight(status: Status) -> int:
    """Causes outweigh consequences: 0 lost peer, 1 requeue, 2 done or failed with a reason of its own."""
    return {EXIT_LOST_PEER: 0, EXIT_REQUEUE: 1}.get(status.exit_code, 2)
