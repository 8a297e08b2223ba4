"""The checkpoint format: what is in a checkpoint's directory, and its manifest.

    step-00000040/
      rank-00000.safetensors   one file a writer; tensors `<kind>/<name>`, flat fp32 ranges of global parameters
      manifest.json            where every range of every tensor is; sizes and SHA-256 of the files; the run's state
      COMMITTED                SHA-256 of the manifest. Written last: without it the directory is not a checkpoint

Kinds: `student` (fp32 weights), `exp_avg` and `exp_avg_sq` (Adam moments, cut like the student), `teacher` (fp32), and
`state`: named fp32 tensors that belong to no module, whole, such as the state of targets. A reader takes all of `state`
or refuses the checkpoint, and refuses kinds that it does not know.
Of what Muon steps there is no `exp_avg_sq`; earlier versions wrote zeros.
A range lies in a tensor-parallel slice of the tensor (a tensor that is not sliced has one slice, itself).

A tensor is cut into one range a rank, at 1,024 ranks and 7 billion parameters into 850,000 in all. They are held as
arrays, and written as runs: ranges of equal length, one behind the other, in files an equal number of ranks apart.
Format 1 wrote every range.

Version policy: FORMAT rises when an older reader could misread a new checkpoint. A reader accepts its own version and
all earlier ones, and refuses later ones.
"""

import json
import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from d2v_scale.errors import CheckpointError, NewerFormatError
from d2v_scale.parallel.shards import TensorSlice

FORMAT = 2
MANIFEST = "manifest.json"
STUDENT_KINDS = ("student", "exp_avg", "exp_avg_sq")
KINDS = (*STUDENT_KINDS, "teacher", "state")


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


Ranges = NDArray[np.int64]
"""(N, 4): file index, slice index, start, numel; ordered by slice, then start."""

_FILE, _SLICE, _START, _NUMEL = range(4)


@dataclass(eq=False)
class TensorEntry:
    """Where one tensor is."""

    shape: tuple[int, ...]
    """Of the global tensor."""
    dim: int | None = None
    slices: int = 1
    pieces: Ranges = field(default_factory=lambda: np.empty((0, 4), dtype=np.int64))

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """The shape of one slice."""
        return local_shape(self.shape, self.dim, self.slices)

    def overlapping(self, index: int, start: int, stop: int) -> list[list[int]]:
        """The pieces that hold some of [start, stop) of slice `index`, in order."""
        low, high = np.searchsorted(self.pieces[:, _SLICE], [index, index + 1])
        starts = self.pieces[low:high, _START]
        first = max(int(np.searchsorted(starts, start, "right")) - 1, 0)
        return self.pieces[low + first : low + int(np.searchsorted(starts, stop, "left"))].tolist()


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
            "moments": self._moments(),
            "files": [[f.name, f.size, f.sha256] for f in self.files],
            "tensors": {
                kind: {name: [e.shape, e.dim, e.slices, _runs(e.pieces)] for name, e in entries.items()}
                for kind, entries in layouts.items()
            },
            "state": self.state,
            "extra": self.extra,
        }
        return json.dumps(body, separators=(",", ":"))

    def _moments(self) -> bool | list[str]:
        """Whether there are any; the names of those that have a second one, where some have only the first."""
        if "exp_avg" not in self.tensors:
            return False
        both = [*self.tensors["exp_avg_sq"]]
        return True if len(both) == len(self.tensors["exp_avg"]) else both

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
        if isinstance(body.get("tensors"), dict) and (unknown := sorted(body["tensors"].keys() - set(KINDS))):
            raise NewerFormatError(
                f"{path} holds {', '.join(unknown)}, written by d2v_scale {body.get('written_by', '?')}, which this "
                "version does not know.",
                "Upgrade d2v_scale to read it.",
            )
        try:
            tensors = {
                kind: {
                    name: TensorEntry(tuple(shape), dim, slices, _ranges(pieces, version, len(body["files"])))
                    for name, (shape, dim, slices, pieces) in entries.items()
                }
                for kind, entries in body["tensors"].items()
            }
            if (both := body["moments"]) is not False:
                _add_moments(tensors, tensors["student"] if both is True else both)
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
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}).") from error


def describe(pieces: Iterable[Piece]) -> dict[str, Any]:
    """The layout of one writer's pieces, as JSON values (the moments' layout is the student's and left out).

    `tensors` is the JSON text of [kind, name, slice shape, slice] of each: nearly all ranks have the same, so that
    whoever reads all reports takes it apart once. `starts` and `numels` are the ranges.
    """
    described = [piece for piece in pieces if piece.kind not in STUDENT_KINDS[1:]]
    tensors = [
        [p.kind, p.name, list(p.shape), [p.slice.dim, p.slice.index, p.slice.count] if p.slice else None]
        for p in described
    ]
    return {
        "tensors": json.dumps(tensors, separators=(",", ":")),
        "starts": [piece.start for piece in described],
        "numels": [piece.values.numel() for piece in described],
    }


def _add_moments(tensors: dict[str, dict[str, TensorEntry]], both: Iterable[str]) -> None:
    """They lie as the student does. `both`: names of those that have a second one."""
    first, second = STUDENT_KINDS[1:]
    tensors[first] = tensors["student"]
    tensors[second] = {name: tensors["student"][name] for name in both}


def merge(
    layouts: Sequence[dict[str, Any]], moments: bool, first_only: Container[str] = ()
) -> dict[str, dict[str, TensorEntry]]:
    """The layouts of all writers (index = file index) as tensor entries. Raises CheckpointError on contradictions.

    `moments`: whether there are any; `first_only`: names of those that have no second one.
    """
    entries: dict[tuple[str, str], TensorEntry] = {}
    numbers: dict[tuple[str, str], int] = {}
    known: dict[str, NDArray[np.int64]] = {}
    tables = [np.empty((0, 5), dtype=np.int64)]
    for file, layout in enumerate(layouts):
        text = layout["tensors"]
        if text not in known:
            known[text] = _numbered(json.loads(text), entries, numbers)
        table = np.empty((len(known[text]), 5), dtype=np.int64)
        table[:, 0], table[:, 1 + _SLICE] = known[text].T
        table[:, 1 + _FILE], table[:, 1 + _START], table[:, 1 + _NUMEL] = file, layout["starts"], layout["numels"]
        tables.append(table)
    everything = np.concatenate(tables)
    everything = everything[_order(everything[:, 1:], everything[:, 0])]
    bounds = np.searchsorted(everything[:, 0], np.arange(len(entries) + 1)).tolist()
    tensors: dict[str, dict[str, TensorEntry]] = {}
    for number, ((kind, name), entry) in enumerate(entries.items()):
        entry.pieces = np.asfortranarray(everything[bounds[number] : bounds[number + 1], 1:])
        tensors.setdefault(kind, {})[name] = entry
    if moments:
        _add_moments(tensors, [name for name in tensors["student"] if name not in first_only])
    check_coverage(tensors)
    return tensors


def first_only(pieces: Iterable[Piece]) -> set[str]:
    """Names of the tensors of one writer that have a first moment and no second."""
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for piece in pieces:
        found[piece.kind].add(piece.name)
    return found["exp_avg"] - found["exp_avg_sq"]


def _numbered(
    described: list[list[Any]], entries: dict[tuple[str, str], TensorEntry], numbers: dict[tuple[str, str], int]
) -> NDArray[np.int64]:
    """(N, 2): number of the tensor, which `entries` and `numbers` get, and of the slice."""
    found = []
    for kind, name, shape, cut in described:
        dim, index, count = cut or (None, 0, 1)
        full = tuple(size * count if axis == dim else size for axis, size in enumerate(shape))
        entry = entries.setdefault((kind, name), TensorEntry(full, dim, count))
        if (entry.shape, entry.dim, entry.slices) != (full, dim, count):
            raise CheckpointError(f"writers disagree about {kind} {name}: {entry.shape} and {full}.")
        found.append((numbers.setdefault((kind, name), len(numbers)), index))
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _order(ranges: Ranges, *above: NDArray[np.int64]) -> NDArray[np.intp]:
    return np.lexsort((ranges[:, _NUMEL], ranges[:, _START], ranges[:, _SLICE], *above))


def _runs(pieces: Ranges) -> list[list[int]]:
    """[file, slice, start, numel] of a range by itself; [..., count, step] where `count` of them follow each other, in
    files `step` apart."""
    if len(pieces) == 0:
        return []
    apart = np.diff(pieces, axis=0)
    follows = (apart[:, _SLICE] == 0) & (apart[:, _NUMEL] == 0) & (apart[:, _START] == pieces[:-1, _NUMEL])
    # The third of a run has to be as far from the second as that is from the first.
    strays = np.zeros_like(follows)
    strays[1:] = follows[:-1] & (apart[1:, _FILE] != apart[:-1, _FILE])
    firsts = np.flatnonzero(np.concatenate(([True], ~follows | strays)))
    counts = np.diff(firsts, append=len(pieces))
    steps = np.where(counts > 1, apart[np.minimum(firsts, len(apart) - 1), _FILE], 0) if len(apart) else counts * 0
    rows = np.column_stack((pieces[firsts], counts, steps)).tolist()
    return [row if row[4] > 1 else row[:4] for row in rows]


def _ranges(rows: list[list[int]], version: int, files: int) -> Ranges:
    """The inverse of `_runs`. Raises ValueError for what no writer of `version` writes."""
    if version == 1:
        ranges = np.array(rows, dtype=np.int64).reshape(-1, 4)
    else:
        runs = np.array([row if len(row) == 6 else [*row, 1, 0] for row in rows], dtype=np.int64).reshape(-1, 6)
        counts = runs[:, 4]
        if (counts < 1).any() or counts.sum() > files + len(rows):
            raise ValueError(f"runs of {counts.sum()} ranges in {files} files")
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ranges = np.repeat(runs[:, :4], counts, axis=0)
        ranges[:, _FILE] += within * np.repeat(runs[:, 5], counts)
        ranges[:, _START] += within * ranges[:, _NUMEL]
    if len(ranges) and not 0 <= ranges[:, _FILE].min() <= ranges[:, _FILE].max() < files:
        raise ValueError(f"a range in a file that is none of the {files}")
    return np.asfortranarray(ranges[_order(ranges)])


def check_coverage(tensors: dict[str, dict[str, TensorEntry]]) -> None:
    """Every element of every tensor exactly once. Raises CheckpointError naming what is missing or double."""
    wrong = []
    for kind, entries in tensors.items():
        if kind in STUDENT_KINDS[1:]:
            continue
        for name, entry in entries.items():
            wrong += [
                f"{kind} {name}" + (f" (slice {index} of {entry.slices})" if entry.slices > 1 else "")
                for index in _not_covered(entry)
            ]
    if wrong:
        shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise CheckpointError(f"pieces are missing or double: {shown}.", "Use another checkpoint.")


def _not_covered(entry: TensorEntry) -> list[int]:
    """Slices that the pieces do not fill, each element once."""
    size = math.prod(entry.slice_shape)
    index, start, numel = entry.pieces[:, _SLICE], entry.pieces[:, _START], entry.pieces[:, _NUMEL]
    ends = start + numel
    begins = np.ones(len(index) + 1, dtype=bool)
    begins[1:-1] = index[1:] != index[:-1]
    expected = np.zeros_like(start)
    expected[1:] = ends[:-1]
    expected[begins[:-1]] = 0
    broken = (start != expected) | (numel < 0) | (begins[1:] & (ends != size))
    bad = set(index[broken].tolist())
    there = index[begins[:-1]].tolist()
    if size or len(there) > entry.slices:
        bad |= set(range(entry.slices)) ^ set(there)
    return sorted(bad)
