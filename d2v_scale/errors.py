"""Errors that end a run, and the exit code each one is reported with.

`ConfigError` and its relatives are the user's to fix: they are raised before any training step, name the key or
file and the remedy, and end the program with exit code 2. The verdicts are conclusions a run comes to about itself.
"""

from pathlib import Path
from typing import Any

from d2v_scale.redaction import redact

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_PARTIAL = 3
"""Of a tool that makes a file for each of many: some could not be made, and are named."""
EXIT_REQUEUE = 10
EXIT_NON_FINITE = 11
EXIT_COLLAPSE = 12
EXIT_DATA_STARVED = 13
EXIT_LOST_PEER = 14
EXIT_SPIKE = 15


class UserError(ValueError):
    """A mistake in what the user gave us. `message` says what is wrong, `remedy` what to do about it."""

    def __init__(self, message: str, remedy: str = "") -> None:
        message, remedy = redact(message), redact(remedy)
        ended = message if message.endswith((".", "?", "!")) else f"{message}."
        super().__init__(f"{ended} {remedy}".strip())

    def __reduce__(self) -> tuple[Any, ...]:
        """Rank 0 sends what it found to the others, who raise it too."""
        return as_it_was(self)


def as_it_was(error: Exception) -> tuple[Any, ...]:
    """What `__reduce__` gives for an error whose `__init__` does not take its own text: `__init__` is left out."""
    return _rebuilt, (type(error), error.args, vars(error))


def _rebuilt(kind: type[Exception], arguments: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    error = kind.__new__(kind, *arguments)
    vars(error).update(state)
    return error


class ConfigError(UserError):
    """A recipe or DeepSpeed key that is unknown, wrong, or contradicts another. `key` is its dotted path."""

    def __init__(self, key: str, message: str, remedy: str = "") -> None:
        super().__init__(f"{key}: {message}", remedy)
        self.key = key


class DataError(UserError):
    """Shards or indexes that are missing, unreadable or contradict each other."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, newer than this version, or of another model."""


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer version wrote: it is not damaged, and must not be passed over for an older one."""


class Verdict(RuntimeError):
    """A run cannot go on, and knows why. Raised by the rank that finds out; what all ranks agree on at a step edge is a
    `signals.StopReason` instead."""

    exit_code = 1


class DataStarved(Verdict):
    """The share of unreadable samples passed its limit, or no batch arrived in time."""

    exit_code = EXIT_DATA_STARVED


class LostPeer(Verdict):
    """Another rank stopped answering."""

    exit_code = EXIT_LOST_PEER


class TrainingEnded(RuntimeError):
    """A training that was started from Python did not reach its end. `exit_code`: of the program."""

    def __init__(self, message: str, exit_code: int, run_dir: Path) -> None:
        super().__init__(redact(message))
        self.exit_code = exit_code
        self.run_dir = run_dir

    def __reduce__(self) -> tuple[Any, ...]:
        return as_it_was(self)
