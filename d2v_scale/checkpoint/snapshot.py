"""What one rank contributes to a checkpoint: a copy that stands still while training goes on, and its description."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from d2v_scale import __version__
from d2v_scale.checkpoint.format import FileEntry, Manifest, Piece, describe, first_only, merge


@dataclass(frozen=True)
class Contents:
    """What a checkpoint of a step holds: of `pieces` each rank has its own; `state` and `extra` are rank 0's."""

    pieces: list[Piece]
    """Views of what training changes."""
    state: dict[str, Any]
    """Counters of the engines."""
    extra: dict[str, Any]
    """What the training loop needs to go on."""


class Snapshot:
    """A place in host memory, pinned beside a GPU, that pieces are copied to; each time the same one."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, pieces: list[Piece]) -> list[Piece]:
        """Copies of `pieces`, until the next time. Waits for the device."""
        total = sum(piece.values.numel() for piece in pieces)
        if self._buffer.numel() < total:
            self._buffer = torch.empty(total, dtype=torch.float32, pin_memory=torch.cuda.is_available())
        copies, offset = [], 0
        for piece in pieces:
            view = self._buffer.narrow(0, offset, piece.values.numel())
            view.copy_(piece.values, non_blocking=True)
            offset += view.numel()
            copies.append(Piece(piece.kind, piece.name, piece.shape, piece.slice, piece.start, view))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def named(pieces: Sequence[Piece]) -> dict[str, torch.Tensor]:
    """The tensors of a rank's file."""
    tensors = {f"{piece.kind}/{piece.name}": piece.values for piece in pieces}
    assert len(tensors) == len(pieces), "two pieces of one tensor on one rank"
    return tensors


def report_of(entry: FileEntry, pieces: Sequence[Piece]) -> dict[str, Any]:
    """What a rank says of its file, as JSON values: `manifest_of` needs those of all."""
    return {
        "file": asdict(entry),
        "layout": describe(pieces),
        "moments": any(piece.kind == "exp_avg" for piece in pieces),
        "first_only": sorted(first_only(pieces)),
    }


def manifest_of(reports: Sequence[dict[str, Any]], step: int, state: dict[str, Any], extra: dict[str, Any]) -> Manifest:
    """The manifest of the files that are reported, in rank order. Raises CheckpointError on contradictions."""
    return Manifest(
        step=step,
        files=[FileEntry(**report["file"]) for report in reports],
        tensors=merge(
            [report["layout"] for report in reports],
            moments=any(report["moments"] for report in reports),
            first_only={name for report in reports for name in report["first_only"]},
        ),
        state=state,
        extra=extra,
        written_by=__version__,
        created=time.time(),
    )
