"""Reading a checkpoint: one range or one tensor at a time, from any process, at any world size."""

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from d2v_scale.checkpoint.format import MANIFEST, Manifest, TensorEntry, check_coverage
from d2v_scale.errors import CheckpointError
from d2v_scale.files import file_sha256
from d2v_scale.parallel.shards import TensorSlice, part_of
from d2v_scale.run_files.committed import MARKER


class Checkpoint:
    """An opened checkpoint. Opening reads the marker and the manifest, not the tensors."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._files: dict[int, Any] = {}

    @staticmethod
    def open(path: str | Path) -> "Checkpoint":
        """Open the directory of one checkpoint. Raises CheckpointError when it is not committed or not readable."""
        path = Path(path)
        try:
            text = (path / MANIFEST).read_text()
        except OSError as error:
            raise CheckpointError(f"{path} has no readable {MANIFEST} ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path / MANIFEST} is damaged ({error}).") from error
        try:
            marker = json.loads((path / MARKER).read_text())["manifest_sha256"]
        except OSError as error:
            raise CheckpointError(f"{path} has no {MARKER} marker: it was never completed.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / MARKER} is damaged ({error}).") from error
        if marker != hashlib.sha256(text.encode()).hexdigest():
            raise CheckpointError(f"{path / MANIFEST} is damaged: its checksum is not the one in {MARKER}.")
        manifest = Manifest.from_json(text, path / MANIFEST)
        try:
            check_coverage(manifest.tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        return Checkpoint(path, manifest)

    @property
    def step(self) -> int:
        """Optimizer steps the run had made (applied or skipped)."""
        return self.manifest.step

    @property
    def extra(self) -> dict[str, Any]:
        """What the training loop stored beside the tensors."""
        return self.manifest.extra

    def kinds(self) -> list[str]:
        """Which of `format.KINDS` are there."""
        return list(self.manifest.tensors)

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind; empty when the checkpoint has none."""
        return list(self.manifest.tensors.get(kind, {}))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """The global shape of a tensor."""
        return self._entry(kind, name).shape

    def tensor(self, kind: str, name: str) -> Tensor:
        """One whole tensor, fp32, on the CPU."""
        entry = self._entry(kind, name)
        slices = [
            self._gather(kind, name, entry, index, 0, None).view(entry.slice_shape) for index in range(entry.slices)
        ]
        return slices[0] if entry.dim is None else torch.cat(slices, dim=entry.dim)

    def read(self, kind: str, name: str, cut: TensorSlice | None, start: int, numel: int) -> Tensor:
        """The flat range [start, start + numel) of a slice of a tensor: fp32, 1-D, on the CPU.

        Reads no more than the range where the checkpoint is sliced in the same way, else the whole tensor.
        """
        entry = self._entry(kind, name)
        wanted = (cut.dim, cut.count) if cut else (None, 1)
        if wanted == (entry.dim, entry.slices):
            return self._gather(kind, name, entry, cut.index if cut else 0, start, numel)
        return part_of(self.tensor(kind, name), cut, start, numel)

    def check_names(self, kind: str, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError, naming every difference, unless `kind` has exactly these tensors (global shapes)."""
        found = {name: self.shape(kind, name) for name in self.names(kind)}
        missing = sorted(expected.keys() - found.keys())
        unexpected = sorted(found.keys() - expected.keys())
        shapes = [f"{n} is {found[n]}, not {expected[n]}" for n in expected if n in found and found[n] != expected[n]]
        if missing or unexpected or shapes:
            parts = [
                f"{what}: {_some(names)}"
                for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
                if names
            ]
            matched = len(expected.keys() & found.keys()) - len(shapes)
            raise CheckpointError(
                f"{self.path} holds another model ({kind}: {matched} tensors match; {'; '.join(parts)}).",
                "Use the recipe that the checkpoint was made with.",
            )

    def verify(self, checksums: bool = True, files: Iterable[int] | None = None) -> None:
        """Check sizes and, with `checksums`, contents of the files (all, or those with these indexes).

        Raises CheckpointError naming the file.
        """
        for index in range(len(self.manifest.files)) if files is None else files:
            entry = self.manifest.files[index]
            path = self.path / entry.name
            try:
                size = path.stat().st_size
                if size != entry.size:
                    raise CheckpointError(f"{path} has {size} bytes instead of {entry.size}.")
                if checksums and file_sha256(path) != entry.sha256:
                    raise CheckpointError(f"{path} is damaged: its checksum differs from the manifest's.")
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from error

    def _entry(self, kind: str, name: str) -> TensorEntry:
        try:
            return self.manifest.tensors[kind][name]
        except KeyError:
            raise CheckpointError(f"{self.path} has no {kind} tensor {name!r}.") from None

    def _gather(self, kind: str, name: str, entry: TensorEntry, index: int, start: int, numel: int | None) -> Tensor:
        if numel is None:
            numel = math.prod(entry.slice_shape)
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for file, _, first, count in entry.overlapping(index, start, start + numel):
            low, high = max(start, first), min(start + numel, first + count)
            if low < high:
                out[low - start : high - start] = self._file(file, kind, name)[low - first : high - first]
                filled += high - low
        assert filled == numel, f"{kind} {name}: found {filled} of {numel} elements"
        return out

    def _place(self, index: int) -> Path:
        return self.path / self.manifest.files[index].name

    def _file(self, index: int, kind: str, name: str) -> Any:
        path = self._place(index)
        try:
            if index not in self._files:
                self._files[index] = safe_open(path, framework="pt")
            return self._files[index].get_slice(f"{kind}/{name}")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _some(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
