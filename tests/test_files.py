import errno
import os
from pathlib import Path

import pytest

from d2v_scale.files import file_sha256, write_whole


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
