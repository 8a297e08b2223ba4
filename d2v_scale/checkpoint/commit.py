"""Writing files so that they are either there or not: fsync, rename, marker last."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from d2v_scale.checkpoint.format import MANIFEST, FileEntry, Manifest
from d2v_scale.files import file_sha256, open_as_usual, write_whole
from d2v_scale.process import faults
from d2v_scale.run_files.committed import MARKER, committed_steps, directory_name


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> FileEntry:
    """Write one safetensors file durably; its size and checksum. The file is removed when that fails."""
    try:
        faults.point("shard_write")
        save_file(tensors, path)
        open_as_usual(path)
        faults.point("shard_write")
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return FileEntry(path.name, path.stat().st_size, file_sha256(path))
    except Exception:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def commit(temporary: Path, root: Path, manifest: Manifest) -> Path:
    """Turn a temporary directory with all its files into the checkpoint `root/step-...`."""
    faults.point("manifest")
    text = manifest.to_json()
    write_whole(temporary / MANIFEST, text)
    sync_directory(temporary)
    final = root / directory_name(manifest.step)
    replaced = None
    if final.exists():
        # From a run that ended after this step and was resumed before it, because this one was damaged.
        replaced = root / f".replaced-{temporary.name.lstrip('.')}"
        final.rename(replaced)
    faults.point("rename")
    temporary.rename(final)
    sync_directory(root)
    faults.point("marker")
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_whole(final / MARKER, json.dumps({"manifest_sha256": digest}))
    sync_directory(final)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
    return final


def retain(root: Path, newest: int, keep_last: int, keep_every: int) -> tuple[list[int], dict[int, str]]:
    """Delete old checkpoints after `newest` was committed; returns the deleted steps, and why others stayed.

    Kept: the last `keep_last` up to `newest`, multiples of `keep_every` (0: none), and everything after `newest`.
    """
    earlier = [step for step in committed_steps(root) if step <= newest]
    last = set(earlier[-max(1, keep_last) :])
    doomed = [step for step in earlier if step not in last and not (keep_every and step % keep_every == 0)]
    stayed: dict[int, str] = {}
    for step in doomed:
        try:
            _delete(root, step)
        except OSError as error:
            stayed[step] = str(error)
    return [step for step in doomed if step not in stayed], stayed


def _delete(root: Path, step: int) -> None:
    path = root / directory_name(step)
    trash = root / f".deleted-{path.name}"
    shutil.rmtree(trash, ignore_errors=True)
    # At once no checkpoint any more, and one that cannot be renamed stays whole.
    path.rename(trash)
    sync_directory(root)
    faults.point("retention")
    shutil.rmtree(trash, ignore_errors=True)


def sweep(root: Path) -> None:
    """Remove what earlier processes left unfinished. Only while no process is writing."""
    for pattern in (".tmp-*", ".deleted-*", ".replaced-*"):
        for path in root.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
