"""d2v_scale.shards.shard_index: what is in a tar, sound or damaged."""

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from small_shards import image_samples

from d2v_scale.data.config import SourceConfig
from d2v_scale.errors import DataError
from d2v_scale.shards.reading import SampleStore
from d2v_scale.shards.shard_index import Members, SetIndex, index_shard, index_tar
from d2v_scale.shards.shard_set import check_before_start, find_shards
from d2v_scale.shards.writing import write_set, write_shard


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_every_sample_can_be_read_back(tmp_path: Path) -> None:
    samples = image_samples(7)
    write_set(tmp_path, "train", "image", samples, per_shard=3)
    shards = find_shards(SourceConfig(shards=str(tmp_path)))
    store = SampleStore(shards)
    read = [store.read(shard, k) for shard in range(3) for k in range(shards.entries[shard].samples)]
    assert [sample.key for sample in read] == [sample["__key__"] for sample in samples]
    assert [bytes(sample.member(("png",))[1]) for sample in read] == [sample["png"] for sample in samples]
    assert [int(bytes(sample.member(("cls",))[1])) for sample in read] == [k % 3 for k in range(7)]


def test_names_that_are_not_utf8_are_indexed_and_read(tmp_path: Path) -> None:
    """A tar with latin-1 names ended the indexing with a traceback."""
    content = write_tar(tmp_path / "t.tar", [("caf_.png", b"1"), ("b.png", b"2")]).read_bytes()
    header = content[:512].replace(b"caf_", b"caf\xe9")
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    header = header[:148] + f"{total:06o}\0 ".encode() + header[156:]
    (tmp_path / "t.tar").write_bytes(header + content[512:])
    entry = index_shard(tmp_path / "t.tar", tmp_path / "t.members", tmp_path)
    assert entry.samples == 2
    SetIndex(content="image", shards=[entry]).save(tmp_path / "t.index.json")
    source = SourceConfig(shards=str(tmp_path / "t.tar"))
    shards = find_shards(source)
    assert check_before_start(shards, source, "image", 0.0) == []
    sample = SampleStore(shards).read(0, 0)
    assert sample.key == "caf\\xe9"
    assert bytes(sample.member(("png",))[1]) == b"1"


def test_keys_with_folders_dots_and_long_names(tmp_path: Path) -> None:
    long = "d" * 150
    members = [("a/b.left.png", b"1"), ("a/b.cls", b"2"), (f"{long}/c.png", b"3"), ("README", b"no sample")]
    members, damage, _ = index_tar(write_tar(tmp_path / "t.tar", members, tarfile.PAX_FORMAT))
    assert [key.decode() for key in members.keys_n] == ["a/b", f"{long}/c"]
    assert members.extensions == ["left.png", "cls", "png"]
    assert members.member_size_ne.tolist() == [[1, 1, -1], [-1, -1, 1]]
    assert damage == []


def test_checksums_cover_headers_and_contents(tmp_path: Path) -> None:
    tar = tmp_path / "t.tar"
    write_shard(tar, image_samples(3))
    members, _, _ = index_tar(tar)
    content = tar.read_bytes()
    for start, size, crc in zip(members.start_n, members.size_n, members.crc_n, strict=True):
        assert zlib.crc32(content[start : start + size]) == crc
        assert start % 512 == 0


def test_indexing_goes_on_behind_a_damaged_header(tmp_path: Path) -> None:
    tar = tmp_path / "t.tar"
    write_shard(tar, image_samples(10))
    with tarfile.open(tar) as opened:
        offset = opened.getmembers()[6].offset
    content = bytearray(tar.read_bytes())
    content[offset + 130] ^= 1
    tar.write_bytes(content)
    members, damage, _ = index_tar(tar)
    assert any("damaged tar header" in line for line in damage)
    keys = [key.decode() for key in members.keys_n]
    assert [key for key in keys if key != "image-0003"] == [f"image-{k:04d}" for k in range(10) if k != 3]


def test_what_cannot_be_measured_is_kept_as_lost(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", [("a.txt", b"12"), ("b.txt", b"x"), ("c.txt", b"4")])
    members, damage, _ = index_tar(tar, lambda sample: int(sample["txt"]))
    assert members.length_n.tolist() == [12, -1, 4]
    assert "b: invalid literal" in damage[0]


def test_an_index_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"nonsense", b"PK\x03\x04"):
        (tmp_path / "x.index").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read"):
            Members.load(tmp_path / "x.index")
    (tmp_path / "x.index.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="another index format"):
        SetIndex.load(tmp_path / "x.index.json")
    with pytest.raises(DataError, match="cannot be read"):
        SetIndex.load(tmp_path / "none.index.json")


def test_the_same_samples_make_the_same_bytes(tmp_path: Path) -> None:
    entries = [write_shard(tmp_path / name / "a.tar", image_samples(5)) for name in ("one", "two")]
    assert entries[0] == entries[1]


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    members, damage, _ = index_tar(write_tar(tmp_path / "t.tar", []))
    assert len(members) == 0
    assert damage == []
    members.save(tmp_path / "t.index")
    assert len(Members.load(tmp_path / "t.index")) == 0
    assert np.array_equal(Members.load(tmp_path / "t.index").length_n, [])
