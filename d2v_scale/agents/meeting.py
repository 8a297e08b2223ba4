"""Where the launchers of a job meet: a directory on the file system that its nodes share.

No host keeps it, so none can be lost with it. `word-NODE` is what a launcher says now: only that launcher writes it, in
place and often, so that it also shows that the launcher lives. `plan-NUMBER.json` is written once, by whoever comes
first; everybody does what stands there.

An NFS client may believe for half a minute that a file which it missed is missing still, while a file that is there is
asked for anew each time that it is opened. So a word's file is never replaced, and a plan's is only opened by who
has read in somebody's word that it is there.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from d2v_scale.agents.plan import Plan
from d2v_scale.files import temporary_name


@dataclass
class Word:
    """What a launcher says of itself."""

    count: int = 0
    """Grows with every word: the launcher lives."""
    plan: int = 0
    """The newest plan that it knows."""
    round: int = 0
    """The round that its ranks belong to; those of the round before are gone."""
    port: int = 0
    """Of the one with rank 0: where the ranks of this round meet."""
    code: int = 0
    """The code that its ranks failed with before they knew of a failure elsewhere."""
    ended: bool = False
    """Its ranks of this round are gone."""
    gone: tuple[int, ...] = ()
    """Ranks of this round that have ended, by their numbers in the world, as far as it knows."""
    asked: bool = False
    """Somebody wishes for an end."""
    problem: str = ""
    """Why this node cannot train."""
    ends: int = 0
    """Of the leader: the round whose ranks are to end."""
    failed: int = 0
    """Of the leader: the code for which they are."""
    gives_up: str = ""
    """Of the leader: why no plan could be written for so long that all end without one."""


class Meeting(Protocol):
    """What launchers need to meet."""

    def publish(self, node: str, word: Word) -> None:
        """Say something. Nothing is raised where it cannot be written: then nobody hears it."""

    def read(self, node: str) -> Word | None:
        """What a launcher said last; None: nothing, or nothing that can be read now."""

    def plan(self, number: int) -> Plan | None:
        """A plan that somebody says is there; None where it cannot be read now."""

    def propose(self, plan: Plan) -> Plan:
        """Make this the plan of its number unless there is one. The one that holds. Raises OSError."""


class Directory:
    """A `Meeting` in a directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._length = 0

    def enter(self, node: str) -> None:
        """Come for the first time. Raises OSError: FileExistsError where this node has been here before, as what stands
        here would then be taken for the word and the plans of this start."""
        os.close(os.open(self._folder / f"word-{node}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))

    def publish(self, node: str, word: Word) -> None:
        text = json.dumps(asdict(word))
        self._length = max(self._length, len(text))
        with contextlib.suppress(OSError):
            file = os.open(self._folder / f"word-{node}", os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                os.pwrite(file, text.ljust(self._length).encode(), 0)
            finally:
                os.close(file)

    def read(self, node: str) -> Word | None:
        try:
            said = json.loads((self._folder / f"word-{node}").read_bytes())
            return Word(**said | {"gone": tuple(said["gone"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def plan(self, number: int) -> Plan | None:
        try:
            found = json.loads(self._file(number).read_bytes())
        except (OSError, ValueError):
            return None
        return Plan(**found | {name: tuple(found[name]) for name in ("active", "further", "attempts")})

    def propose(self, plan: Plan) -> Plan:
        file = self._file(plan.number)
        temporary = temporary_name(file)
        try:
            with temporary.open("w") as text:
                json.dump(asdict(plan), text)
                text.flush()
                os.fsync(text.fileno())
            os.link(temporary, file)
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
        found = self.plan(plan.number)
        if found is None:
            raise OSError(f"{file} cannot be read")
        return found

    def _file(self, number: int) -> Path:
        return self._folder / f"plan-{number:05d}.json"
