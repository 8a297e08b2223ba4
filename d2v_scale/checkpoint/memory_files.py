"""Copies of a run's state in the memory file system of a node: where they are, and which can be trusted. Torch-free.

    /dev/shm/d2v_scale-<uid>/<run>/{own,held}/step-00000040/
      rank-00000.safetensors   the shard of that rank, as a checkpoint has it
      rank-00000.json          its report, with the run it is of; written last: without it there is no copy

`own` is what the node's ranks wrote themselves, `held` what ranks of the node before sent. A report's first line is the
SHA-256 of the second. Nobody trusts a name: a copy counts if its report names this run, its configuration, division
and branch, and its checksum is right.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.files import file_sha256, write_whole
from d2v_scale.run_files.committed import directory_name
from d2v_scale.run_files.run_start import MEMORY_FILE, RECIPE_FILE

log = logging.getLogger(__name__)

KEY = "checkpoint.memory.dir"
OWN, HELD = "own", "held"
FORGOTTEN_S = 24 * 3600.0
"""After which copies of runs that nobody came back for are removed."""
_SHM = Path("/dev/shm")


@dataclass(frozen=True)
class Identity:
    """What a copy is of, beside its step and rank."""

    run: str
    """Of one run directory, and one beginning in it."""
    world_size: int
    digest: str
    """Of the recipe and of how it is divided among ranks."""
    branch: int
    """How often the run went back to an earlier step and left out samples."""

    def differs(self, other: Mapping[str, Any]) -> str:
        """Why something that says this of itself is of no use, in words; empty if it is."""
        if other.get("run") != self.run:
            return "is of another run"
        if other.get("world_size") != self.world_size:
            return f"is of {other.get('world_size')} ranks, and here are {self.world_size}"
        if other.get("digest") != self.digest:
            return "is of another configuration or division among ranks"
        if other.get("branch") != self.branch:
            return "is from before the run went back and left out samples"
        return ""


@dataclass(frozen=True)
class Copy:
    """A copy of one rank's shard that lies on this node."""

    step: int
    session: str
    """The attempt that made it: shards of two are never put together."""
    rank: int
    data: Path
    report: dict[str, Any]

    def problem(self) -> str:
        """What is wrong with its contents, in words; empty if nothing is."""
        try:
            if file_sha256(self.data) == self.report["file"]["sha256"]:
                return ""
            return "its checksum differs from its report's"
        except OSError as error:
            return f"it cannot be read ({error.strerror})"


def base_directory(wanted: str) -> Path:
    """What `checkpoint.memory.dir` means on this node. Raises ConfigError."""
    path = _SHM if wanted == "auto" else Path(os.path.expandvars(wanted))
    if "$" in str(path):
        raise ConfigError(KEY, f"is {wanted}, of which this process's environment does not know all", "Set it.")
    if not path.is_absolute():
        raise ConfigError(KEY, f"is {wanted}, which is relative", "Give a path that begins with /.")
    if wanted == "auto" and not path.is_dir():
        raise ConfigError(KEY, f"is auto, and there is no {_SHM} here", "Name a memory file system of every node.")
    return path


def run_name(root: Path, *, make: bool) -> str:
    """What copies of the run whose checkpoints are in `root` go by: of this folder and this beginning of a run in it.
    `make`: begin one where there is none; else empty then. Raises OSError."""
    path = root / MEMORY_FILE
    if not path.exists():
        if not make:
            return ""
        write_whole(path, os.urandom(16).hex())
    return hashlib.sha256(f"{path.read_text()} {root.resolve()}".encode()).hexdigest()[:32]


def forget_run(run_dir: Path) -> bool:
    """Remove the copies on this node of a run that is over; whether there were any."""
    try:
        run = run_name(run_dir / "checkpoints", make=False)
        recipe = yaml.safe_load((run_dir / RECIPE_FILE).read_text())
        folder = base_directory(recipe["checkpoint"]["memory"]["dir"]) / _of_user() / run
        if not run or not folder.is_dir() or not _is_mine(folder.parent):
            return False
    except (OSError, ConfigError, yaml.YAMLError, KeyError, TypeError):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    return True


class MemoryFolder:
    """The copies of one run on one node. All of the node's ranks use it."""

    def __init__(self, wanted: str, run: str) -> None:
        """Make it where it is missing. Raises ConfigError where nothing can be written, or somebody else could."""
        users = base_directory(wanted) / _of_user()
        self.path = users / run
        try:
            users.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_mine(users):
                raise ConfigError(KEY, f"has {users}, which is another user's", "Name another folder.")
            for kind in (OWN, HELD):
                (self.path / kind).mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(KEY, f"is {wanted}, which cannot be written ({error})", "Name another folder.") from error

    def place(self, kind: str, step: int, rank: int) -> Path:
        """The file of a shard. Its folder is made."""
        folder = self.path / kind / directory_name(step)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder / f"rank-{rank:05d}.safetensors"

    def copies(self, identity: Identity, place: int, places: int) -> list[Copy]:
        """Those that are of `identity`; every `places`-th from `place` on, so that the ranks of a node share the work.
        Why others are passed over is logged. Contents are not looked at."""
        found: list[Copy] = []
        refused: dict[str, Path] = {}
        for path in sorted(self.path.glob("*/step-*/rank-*.json"))[place::places]:
            try:
                report = read_report(path.read_text())
            except (OSError, ValueError, CheckpointError) as error:
                log.warning("The copy in memory %s is passed over: %s", path, error)
                continue
            if why := identity.differs(report):
                refused.setdefault(why, path)
                continue
            data = path.with_suffix(".safetensors")
            found.append(Copy(report["step"], report["session"], report["rank"], data, report))
        for why, path in refused.items():
            log.warning("The copy in memory %s is passed over: it %s", path, why)
        return found

    def keep(self, steps: Collection[int]) -> None:
        """Remove the copies of all other steps."""
        names = {directory_name(step) for step in steps}
        for folder in self.path.glob("*/step-*"):
            if folder.name not in names:
                shutil.rmtree(folder, ignore_errors=True)

    def held_bytes(self) -> int:
        """Of all files here."""
        return sum(_size(path) for path in self.path.rglob("*.safetensors"))

    def remove(self) -> None:
        """All of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_forgotten(self, now: float | None = None) -> None:
        """Remove what other runs of this user left here and have not touched for a day."""
        limit = (time.time() if now is None else now) - FORGOTTEN_S
        for folder in self.path.parent.iterdir():
            with contextlib.suppress(OSError):
                if folder != self.path and folder.is_dir() and max(_touched(folder)) < limit:
                    log.warning("Copies in memory of a run that nobody came back for are removed: %s", folder)
                    shutil.rmtree(folder, ignore_errors=True)


def report_text(identity: Identity, session: str, step: int, rank: int, report: Mapping[str, Any]) -> str:
    """What a report's file holds."""
    body = {**asdict(identity), "session": session, "step": step, "rank": rank, **report}
    text = json.dumps(body, separators=(",", ":"))
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def read_report(text: str) -> dict[str, Any]:
    """The inverse of `report_text`. Raises CheckpointError for what it did not make."""
    digest, _, body = text.partition("\n")
    if hashlib.sha256(body.encode()).hexdigest() != digest:
        raise CheckpointError("its report is damaged.")
    report: dict[str, Any] = json.loads(body)
    return report


def _of_user() -> str:
    return f"d2v_scale-{os.getuid()}"


def _is_mine(folder: Path) -> bool:
    """Everybody may make folders in a memory file system, also under the names of others."""
    there = folder.lstat()
    return there.st_uid == os.getuid() and folder.is_dir() and not folder.is_symlink() and not there.st_mode & 0o022


def _touched(folder: Path) -> Iterator[float]:
    yield folder.stat().st_mtime
    for path in folder.rglob("*"):
        yield path.lstat().st_mtime


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
