import errno
import os
from pathlib import Path

import pytest
import torch

from d2v_scale.checkpoint.commit import write_tensors
from d2v_scale.conversion.demo import write as write_demo
from d2v_scale.files import atomic_file, file_sha256, write_whole
from d2v_scale.interop import exporting
from d2v_scale.run_files.run_lock import lock, release
from d2v_scale.tracking.record import MetricsLog


def test_a_file_is_replaced_as_a_whole_and_a_failure_leaves_the_old_one_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_whole(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"state.json": "old"}


def test_the_checksum_is_that_of_sha256sum(tmp_path: Path) -> None:
    write_whole(tmp_path / "abc", b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_everything_that_is_written_has_the_mode_of_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    """Weights were for their owner only: safetensors writes a temporary file and renames it."""
    monkeypatch.setattr(exporting, "FILE_BYTES", 8)
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "small.json", "{}")
        write_tensors(tmp_path / "rank-00000.safetensors", {"a": torch.zeros(2)})
        (tmp_path / "export").mkdir()
        exporting.write_tensors(iter([("a", torch.zeros(2)), ("b", torch.zeros(2))]), tmp_path / "export")
        with atomic_file(tmp_path / "a.index") as temporary:
            temporary.write_bytes(b"")
        MetricsLog(tmp_path / "run").write(1, 1, {"loss": 1.0})
        lock(tmp_path / "run")
        release()
        write_demo("vision", tmp_path / "demo_data")
    finally:
        os.umask(before)
    made = list(tmp_path.rglob("*"))
    assert {".safetensors", ".index", ".jsonl", ".json", ".tar"} <= {path.suffix for path in made}
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
