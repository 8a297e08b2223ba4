"""The checkpoint format: what is in a checkpoint's directory, and its manifest.

    step-00000040/
      rank-00000.safetensors   one file a writer; tensors `<kind>/<name>`, flat fp32 ranges of global parameters
      manifest.json            where every range of every tensor is; sizes and SHA-256 of the files; the run's state
      COMMITTED                SHA-256 of the manifest. Written last: without it the directory is not a checkpoint

Kinds: `student` (fp32 weights), `exp_avg` and `exp_avg_sq` (Adam moments, cut like the student), `teacher` (fp32).
A range lies in a tensor-parallel slice of the tensor (a tensor that is not sliced has one slice, itself).

Version policy: FORMAT rises when an older reader could misread a new checkpoint. A reader accepts its own version and
all earlier ones, and refuses later ones.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from d2v_scale.errors import CheckpointError, NewerFormatError
from d2v_scale.parallel.shards import TensorSlice

FORMAT = 1
MANIFEST = "manifest.json"
STUDENT_KINDS = ("student", "exp_avg", "exp_avg_sq")


def local_shape(shape: tuple[int, ...], dim: int | None, count: int) -> tuple[int, ...]:
    """The shape of one of `count` slices along `dim`."""
    if dim is None:
        return shape
    return tuple(size // count if axis == dim else size for axis, size in enumerate(shape))


@dataclass(frozen=True)
class Piece:
    """Values a writer has: the flat range [start, start + numel) of a slice of a tensor."""

    kind: str
    name: str
    shape: tuple[int, ...]
    """Of the slice."""
    slice: TensorSlice | None
    start: int
    values: Tensor
    """1-D; copied when the checkpoint is saved."""


@dataclass
class TensorEntry:
    """Where one tensor is. `pieces`: (file index, slice index, start, numel)."""

    shape: tuple[int, ...]
    """Of the global tensor."""
    dim: int | None = None
    slices: int = 1
    pieces: list[tuple[int, int, int, int]] = field(default_factory=list)

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """The shape of one slice."""
        return local_shape(self.shape, self.dim, self.slices)


@dataclass
class FileEntry:
    """A file of the checkpoint, as it was written."""

    name: str
    size: int
    sha256: str


@dataclass
class Manifest:
    """Everything about a checkpoint but its tensors' values."""

    step: int
    files: list[FileEntry]
    tensors: dict[str, dict[str, TensorEntry]]
    """kind -> name -> entry."""
    state: dict[str, Any]
    """Counters of the engines."""
    extra: dict[str, Any]
    """What the training loop needs to go on: data positions, recipe, versions, run ids."""
    format: int = FORMAT
    written_by: str = ""
    created: float = 0.0

    def to_json(self) -> str:
        """Compact JSON; moments share the student's entry."""
        layouts = {k: v for k, v in self.tensors.items() if k not in STUDENT_KINDS[1:]}
        body = {
            "format": self.format,
            "written_by": self.written_by,
            "created": self.created,
            "step": self.step,
            "moments": "exp_avg" in self.tensors,
            "files": [[f.name, f.size, f.sha256] for f in self.files],
            "tensors": {
                kind: {name: [e.shape, e.dim, e.slices, e.pieces] for name, e in entries.items()}
                for kind, entries in layouts.items()
            },
            "state": self.state,
            "extra": self.extra,
        }
        return json.dumps(body, separators=(",", ":"))

    @staticmethod
    def from_json(text: str, path: Path) -> "Manifest":
        """Raises CheckpointError for a newer format or a text that is no manifest."""
        try:
            body = json.loads(text)
            version = int(body["format"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a checkpoint manifest ({error}).") from error
        if version > FORMAT:
            raise NewerFormatError(
                f"{path} has checkpoint format {version}, written by d2v_scale {body.get('written_by', '?')}; this "
                f"version reads formats up to {FORMAT}.",
                "Upgrade d2v_scale to read it.",
            )
        try:
            tensors = {
                kind: {
                    name: TensorEntry(tuple(shape), dim, slices, [tuple(piece) for piece in pieces])  # type: ignore[misc]
                    for name, (shape, dim, slices, pieces) in entries.items()
                }
                for kind, entries in body["tensors"].items()
            }
            if body["moments"]:
                for kind in STUDENT_KINDS[1:]:
                    tensors[kind] = tensors["student"]
            return Manifest(
                step=body["step"],
                files=[FileEntry(*entry) for entry in body["files"]],
                tensors=tensors,
                state=body["state"],
                extra=body["extra"],
                format=version,
                written_by=body["written_by"],
                created=body["created"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}).") from error


def describe(pieces: Iterable[Piece]) -> list[list[Any]]:
    """The layout of one writer's pieces, as JSON values (the moments' layout is the student's and left out)."""
    return [
        [p.kind, p.name, list(p.shape), [p.slice.dim, p.slice.index, p.slice.count] if p.slice else None, p.start,
         p.values.numel()]
        for p in pieces
        if p.kind not in STUDENT_KINDS[1:]
    ]  # fmt: skip


def merge(layouts: list[list[list[Any]]], moments: bool) -> dict[str, dict[str, TensorEntry]]:
    """The layouts of all writers (index = file index) as tensor entries. Raises CheckpointError on contradictions."""
    tensors: dict[str, dict[str, TensorEntry]] = defaultdict(dict)
    for file, layout in enumerate(layouts):
        for kind, name, shape, cut, start, numel in layout:
            dim, index, count = cut or (None, 0, 1)
            full = tuple(size * count if axis == dim else size for axis, size in enumerate(shape))
            entry = tensors[kind].setdefault(name, TensorEntry(full, dim, count))
            if (entry.shape, entry.dim, entry.slices) != (full, dim, count):
                raise CheckpointError(f"writers disagree about {kind} {name}: {entry.shape} and {full}.")
            entry.pieces.append((file, index, start, numel))
    if moments:
        for kind in STUDENT_KINDS[1:]:
            tensors[kind] = tensors["student"]
    check_coverage(tensors)
    return dict(tensors)


def check_coverage(tensors: dict[str, dict[str, TensorEntry]]) -> None:
    """Every element of every tensor exactly once. Raises CheckpointError naming what is missing or double."""
    wrong = []
    for kind, entries in tensors.items():
        if kind in STUDENT_KINDS[1:]:
            continue
        for name, entry in entries.items():
            size = math.prod(entry.slice_shape)
            ranges: dict[int, list[tuple[int, int]]] = defaultdict(list)
            for _, index, start, numel in entry.pieces:
                ranges[index].append((start, numel))
            for index in range(entry.slices):
                position = 0
                for start, numel in sorted(ranges[index]):
                    if start != position:
                        break
                    position += numel
                if position != size or sum(numel for _, numel in ranges[index]) != size:
                    wrong.append(f"{kind} {name}" + (f" (slice {index} of {entry.slices})" if entry.slices > 1 else ""))
    if wrong:
        shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise CheckpointError(f"pieces are missing or double: {shown}.", "Use another checkpoint.")
