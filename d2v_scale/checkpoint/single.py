"""Writing a checkpoint from one process: imported weights, tools, tests."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from d2v_scale import __version__
from d2v_scale.checkpoint.commit import commit, write_tensors
from d2v_scale.checkpoint.format import FileEntry, Manifest, Piece, describe, merge
from d2v_scale.run_files.committed import directory_name

FILE_BYTES = 2 << 30
"""A new file is begun after this many bytes, which bounds the memory that is needed."""


def write_single(
    path: str | Path,
    student: Mapping[str, Tensor] | None = None,
    teacher: Mapping[str, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
    step: int = 0,
) -> Path:
    """Write weights (no Adam moments) as a checkpoint `path/step-<step>`; returns that directory.

    Tensors are read from the mappings one at a time, and stored in fp32.
    """
    root = Path(path)
    temporary = root / f".tmp-{directory_name(step)}-single"
    temporary.mkdir(parents=True, exist_ok=True)
    layouts: list[dict[str, Any]] = []
    files: list[FileEntry] = []
    pending: list[Piece] = []

    def flush() -> None:
        tensors = {f"{p.kind}/{p.name}": p.values for p in pending}
        files.append(write_tensors(temporary / f"rank-{len(files):05d}.safetensors", tensors))
        layouts.append(describe(pending))
        pending.clear()

    for kind, tensors in (("student", student or {}), ("teacher", teacher or {})):
        for name in tensors:
            tensor = tensors[name].detach().to("cpu", torch.float32)
            values = tensor.contiguous().reshape(-1).clone()
            pending.append(Piece(kind, name, tuple(tensor.shape), None, 0, values))
            if sum(p.values.nbytes for p in pending) >= FILE_BYTES:
                flush()
    if pending:
        flush()
    manifest = Manifest(
        step=step,
        files=files,
        tensors=merge(layouts, moments=False),
        state={"completed_updates": 0, "skipped_updates": 0},
        extra=extra or {},
        written_by=__version__,
        created=time.time(),
    )
    return commit(temporary, root, manifest)
