"""Whether the launcher starts the ranks again after a fault, without leaving the job. Torch-free.

What is worth another try is decided as for a requeued job (`attempts`), from status.json and the exit code. A kind of
fault may come again so often without a new checkpoint; each new checkpoint begins the count anew. Every attempt is a
line in attempts.jsonl.
"""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

from d2v_scale.checkpoint.memory_files import forget_run
from d2v_scale.errors import EXIT_DATA_STARVED, EXIT_LOST_PEER, EXIT_REQUEUE
from d2v_scale.files import append_line
from d2v_scale.process.started import TELL
from d2v_scale.process.status import ATTEMPTS_FILE, read_status
from d2v_scale.running.attempts import Attempt, decide, ended, newest_checkpoint, read_attempts

log = logging.getLogger("d2v_scale.train")

_KINDS = {EXIT_REQUEUE: "hang", EXIT_DATA_STARVED: "data starvation", EXIT_LOST_PEER: "lost process"}


def kind_of(attempt: Attempt) -> str:
    """What sort of fault ended an attempt."""
    return _KINDS.get(attempt.exit_code, "crash")


def may_restart(history: Sequence[Attempt], restarts: int) -> tuple[bool, str]:
    """Whether the ranks of `history` (oldest first) are started again, and why or why not, in words. `restarts`: how
    often for each kind of fault without a new checkpoint between."""
    newest = history[-1]
    if newest.was_asked_to_stop or not decide([newest], 2).requeue:
        return False, newest.reason
    kind, same = kind_of(newest), 0
    for attempt in reversed(history):
        if attempt.step != newest.step:
            break
        same += kind_of(attempt) == kind and not attempt.was_asked_to_stop
    if same > restarts:
        return False, f"{kind} number {same} without a new checkpoint, and --restarts is {restarts}: {newest.reason}"
    return True, f"{kind}, restart {same} of {restarts} without a new checkpoint: {newest.reason}"


def _given(arguments: Sequence[str]) -> Path | None:
    """The run directory that arguments of the training program name."""
    for word, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        name, is_one_word, value = word.partition("=")
        if name in ("--run_dir", "--resume"):
            return Path(value if is_one_word else following)
    return None


class Restarts:
    """Decides for one launcher, which tells the ranks a file of `folder` for where their run directory is."""

    def __init__(self, restarts: int, folder: Path, arguments: Sequence[str]) -> None:
        """`arguments`: of the training program."""
        self._restarts, self._told = restarts, folder / "run_dir"
        self._given = _given(arguments)

    @property
    def environment(self) -> dict[str, str]:
        """For the ranks."""
        return {TELL: str(self._told)}

    def is_saving(self, ended: Collection[int]) -> bool:
        """Whether the other ranks are completing a checkpoint, for which those that have `ended` (their numbers) had
        written their files. Rank 0 puts it together: without it there is none."""
        directory = self.directory
        if 0 in ended or directory is None:
            return False
        for temporary in (directory / "checkpoints").glob(".tmp-*"):
            if all((temporary / f"rank-{rank:05d}.json").exists() for rank in ended):
                return True
        return False

    def attempt(self, code: int, since: float = 0.0) -> Attempt | None:
        """How the ranks ended, with this code of the first that failed; None: they had no run directory yet. `since`:
        when they were started (Unix seconds); what status.json said before is no word on them."""
        directory = self.directory
        if directory is None:
            return None
        status = read_status(directory)
        told = None if status is not None and status.time < since else status
        return replace(ended(told, code, newest_checkpoint(directory), "the launcher's"), time=time.time())

    @property
    def directory(self) -> Path | None:
        """The run directory, once the ranks have told it."""
        try:
            return Path(self._told.read_text())
        except OSError:
            return None

    @property
    def directory_or_given(self) -> Path | None:
        """The same, or before that the one that the arguments name, if it is there."""
        given = self._given if self._given is not None and self._given.is_dir() else None
        return self.directory or given

    def may_follow(self, history: Sequence[Attempt]) -> tuple[bool, str]:
        """`may_restart` by the number of restarts that was given."""
        return may_restart(history, self._restarts)

    def further(self) -> list[str]:
        """Further arguments for ranks that are started again."""
        directory = self.directory
        return [] if self._given is not None or directory is None else ["--run_dir", str(directory)]

    def again(self, code: int, since: float) -> list[str] | None:
        """Further arguments for the ranks that are started again after they ended with this code; None: they are not.
        `since`: when they were started (Unix seconds)."""
        attempt, directory = self.attempt(code, since), self.directory
        if attempt is None or directory is None:
            log.error("The ranks ended with code %d before they had a run directory: they are not started again", code)
            return None
        history = [*read_attempts(directory), attempt]
        try:
            append_line(directory / ATTEMPTS_FILE, asdict(attempt))
        except OSError as error:
            log.error("Not started again, as attempts cannot be counted (%s): %s", error, attempt.reason)
            return None
        restart, why = self.may_follow(history)
        log.warning("%s: %s", "The ranks are started again" if restart else "The ranks are not started again", why)
        if not restart:
            forget_run(directory)
            return None
        return self.further()
