"""Finding the checkpoint to go on from."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from d2v_scale.checkpoint.format import MARKER
from d2v_scale.checkpoint.reader import Checkpoint
from d2v_scale.errors import CheckpointError

log = logging.getLogger(__name__)

Verify = Callable[[Checkpoint], str | None]


@dataclass(frozen=True)
class Skipped:
    """A directory that was passed over, and why."""

    path: Path
    reason: str


def verify_alone(checkpoint: Checkpoint) -> str | None:
    """Check all files; the reason against it, or None."""
    try:
        checkpoint.verify()
    except CheckpointError as error:
        return str(error)
    return None


def verify_together(checkpoint: Checkpoint) -> str | None:
    """Each rank checks its share of the files. Collective: all ranks must call; all get the same answer."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    reason = None
    try:
        checkpoint.verify(files=range(rank, len(checkpoint.manifest.files), world_size))
    except CheckpointError as error:
        reason = str(error)
    reasons: list[str | None] = [None] * world_size
    dist.all_gather_object(reasons, reason)
    return next((r for r in reasons if r is not None), None)


def find_newest_valid(directory: str | Path, verify: Verify = verify_alone) -> tuple[Checkpoint | None, list[Skipped]]:
    """The valid checkpoint with the highest step under `directory`, and those that were skipped, each with a warning.

    (None, []) when there are none at all. Raises CheckpointError when there are some and none is valid, or when one
    was written by a newer version. With `verify=verify_together` all ranks must call.
    """
    skipped: list[Skipped] = []
    for path in sorted(Path(directory).glob("step-*"), reverse=True):
        try:
            checkpoint = Checkpoint.open(path)
        except CheckpointError as error:
            if "checkpoint format" in str(error):
                raise
            reason: str | None = str(error)
        else:
            reason = verify(checkpoint)
            if reason is None:
                return checkpoint, skipped
        skipped.append(Skipped(path, reason or ""))
        log.warning("skipping checkpoint %s: %s", path.name, reason)
    if any((s.path / MARKER).exists() for s in skipped):
        reasons = "; ".join(s.reason for s in skipped)
        raise CheckpointError(f"{directory} holds no valid checkpoint: {reasons}", "Restore one, or start a new run.")
    return None, skipped


def open_any(path: str | Path) -> Checkpoint:
    """Open a checkpoint, the newest valid one of a `checkpoints` directory, or that of a run directory.

    Raises CheckpointError when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if any(path.glob("rank-*")) or (path / "manifest.json").exists():
        checkpoint = Checkpoint.open(path)
        checkpoint.verify()
        return checkpoint
    for directory in (path / "checkpoints", path):
        found, _ = find_newest_valid(directory)
        if found is not None:
            return found
    raise CheckpointError(f"{path} holds no checkpoint.", "Give a run directory or a step-... directory.")
