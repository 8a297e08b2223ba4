"""Finding the checkpoint to go on from."""

import logging
from dataclasses import dataclass
from pathlib import Path

from d2v_scale.checkpoint.reader import Checkpoint
from d2v_scale.errors import CheckpointError, NewerFormatError
from d2v_scale.run_files.committed import MARKER

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """A directory that was passed over, and why."""

    path: Path
    reason: str


def find_newest_valid(
    directory: str | Path, *, together: bool = False, checksums: bool = True
) -> tuple[Checkpoint | None, list[Skipped]]:
    """The valid checkpoint with the highest step under `directory`, and those that were skipped, each with a warning.

    (None, []) when there are none at all. Raises CheckpointError when there are some and none is valid, or when one
    was written by a newer version. `together`: all ranks must call; they look through rank 0's list (a file system may
    not show the newest one to everybody yet), share the work of verifying, and get the same answer. `checksums`: verify
    the contents of the files, too, not their sizes alone.
    """
    paths = sorted(Path(directory).glob("step-*"), reverse=True)
    if together:
        paths = _of_rank_0(paths)
    skipped: list[Skipped] = []
    for path in paths:
        checkpoint, errors = _opened(path, together, checksums)
        if checkpoint is not None and not errors:
            return checkpoint, skipped
        for error in errors:
            if isinstance(error, NewerFormatError):
                raise error
        skipped.append(Skipped(path, str(errors[0])))
        log.warning("skipping checkpoint %s: %s", path.name, errors[0])
    if any((s.path / MARKER).exists() for s in skipped):
        told = "; ".join(s.reason for s in skipped)
        raise CheckpointError(f"{directory} holds no valid checkpoint: {told}", "Restore one, or start a new run.")
    return None, skipped


def _opened(path: Path, together: bool, checksums: bool) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """A checkpoint, and what speaks against it: here, or with `together` on any rank."""
    import torch.distributed as dist

    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    checkpoint, problem = None, None
    try:
        checkpoint = Checkpoint.open(path)
        checkpoint.verify(checksums, files=range(rank, len(checkpoint.manifest.files), world_size))
    except CheckpointError as error:
        problem = error
    problems: list[CheckpointError | None] = [problem] * world_size
    if together:
        dist.all_gather_object(problems, problem)
    return checkpoint, [problem for problem in problems if problem is not None]


def _of_rank_0(paths: list[Path]) -> list[Path]:
    import torch.distributed as dist

    listed = [[str(path) for path in paths]]
    dist.broadcast_object_list(listed, src=0)
    return [Path(path) for path in listed[0]]


def open_any(path: str | Path, *, together: bool = False, checksums: bool = True) -> Checkpoint:
    """Open a checkpoint, the newest valid one of a `checkpoints` directory, or that of a run directory.

    `together`: all ranks must call, and share the work of verifying. `checksums`: as in `find_newest_valid`. Raises
    CheckpointError when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if any(path.glob("rank-*")) or (path / "manifest.json").exists():
        checkpoint, errors = _opened(path, together, checksums)
        if checkpoint is None or errors:
            raise errors[0]
        return checkpoint
    for directory in (path / "checkpoints", path):
        found, _ = find_newest_valid(directory, together=together, checksums=checksums)
        if found is not None:
            return found
    raise CheckpointError(f"{path} holds no checkpoint.", "Give a run directory or a step-... directory.")
