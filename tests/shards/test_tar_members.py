"""d2v_scale.shards.tar_members and tar_samples: what Python's tarfile gives for a member, the index gives or names."""

import gzip
import io
import os
import random
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.errors import DataError
from d2v_scale.shards.reading import RawSample, ReadAt, SampleFault, read_sample
from d2v_scale.shards.shard_index import Members, TarContents, index_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def file(name: str, content: bytes = b"content", kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    return info, content


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def write(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content) if content else None)
    return path


def reader(content: bytes) -> ReadAt:
    return lambda start, size: content[start : start + size]


def samples(path: Path, found: TarContents, saved_to: Path | None = None) -> list[RawSample | str]:
    """Every sample of the index, or the fault of those that are lost."""
    members = found.members
    if saved_to is not None:
        members.save(saved_to)
        members = Members.load(saved_to)
    read: list[RawSample | str] = []
    for number in range(len(members)):
        try:
            read.append(read_sample("t", reader(path.read_bytes()), members, number))
        except SampleFault as error:
            read.append(str(error))
    return read


def values(path: Path, found: TarContents, extension: str = "jpg") -> dict[str, bytes]:
    """Of whole samples, by key."""
    return {
        sample.key: bytes(sample.member((extension,))[1])
        for sample in samples(path, found)
        if isinstance(sample, RawSample) and sample.has(extension)
    }


def from_library(path: Path, **options: bool) -> dict[str, bytes]:
    with tarfile.open(path, **options) as tar:
        return {
            info.name.rpartition(".")[0]: stream.read() for info in tar if (stream := tar.extractfile(info)) is not None
        }


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=pax"]])
@pytest.mark.parametrize(
    "holes", [[(65536, 131072)], [(0, 65536), (131072, 262144)], [(0, 262144)], [(200704, 262144)]]
)
def test_sparse_members_are_read_with_their_holes(
    tmp_path: Path, options: list[str], holes: list[tuple[int, int]]
) -> None:
    """The headers and files behind them were read as their content, and --check said that nothing was lost."""
    source = tmp_path / "source"
    source.mkdir()
    for k in range(3):
        content = bytearray(random.Random(k).randbytes(262144 + k))
        for start, stop in holes:
            content[start:stop] = bytes(stop - start)
        with (source / f"{k}.jpg").open("wb") as stream:
            position = 0
            for start, stop in holes:
                stream.write(content[position:start])
                stream.seek(stop)
                position = stop
            stream.write(content[position:])
            stream.truncate(len(content))
        (source / f"{k}.cls").write_bytes(b"%d" % k)
    tar = tmp_path / "t.tar"
    names = [f"{k}.{extension}" for k in range(3) for extension in ("jpg", "cls")]
    subprocess.run(["tar", "-S", "--hole-detection=raw", *options, "-C", source, "-cf", tar, *names], check=True)
    assert tar.stat().st_size < 3 * 262144, "stored sparse"
    found = index_tar(tar, lambda members: len(members["jpg"]))
    assert found.damage == found.passed_over == []
    assert found.members.length_n.tolist() == [262144, 262145, 262146]
    assert values(tar, found) == {str(k): (source / f"{k}.jpg").read_bytes() for k in range(3)}
    assert values(tar, found, "cls") == {"0": b"0", "1": b"1", "2": b"2"}
    for sample in samples(tar, found, tmp_path / "t.index"):
        assert isinstance(sample, RawSample)


@pytest.mark.parametrize("kind", FORMATS)
def test_links_have_the_bytes_that_they_lead_to(tmp_path: Path, kind: int) -> None:
    """They vanished."""
    members = [
        file("a/1.jpg", b"one"),
        file("a/1.cls", b"1"),
        link("a/2.jpg", "a/1.jpg"),
        link("a/2.cls", "./a/1.cls"),
        link("b/3.jpg", "../a/4.jpg", tarfile.SYMTYPE),
        file("a/4.jpg", b"four"),
        link("b/5.jpg", "3.jpg", tarfile.SYMTYPE),
        link("b/6.jpg", "a/2.jpg"),
        file("a/1.jpg", b"one again"),
        link("b/7.jpg", "a/1.jpg"),
        link("b/8.jpg", "../a/1.jpg", tarfile.SYMTYPE),
    ]
    tar = write(tmp_path / "t.tar", members, kind)
    found = index_tar(tar)
    assert found.damage == []
    assert [sample for sample in samples(tar, found, tmp_path / "t.index") if isinstance(sample, str)] == []
    with tarfile.open(tar) as opened:
        expected = [opened.extractfile(info).read() for info in opened if info.name.endswith("jpg")]  # type: ignore[union-attr]
    read = [bytes(one.member(("jpg",))[1]) for one in samples(tar, found) if isinstance(one, RawSample)]
    assert read == expected
    assert found.members.member_size_ne[1].tolist() == [3, 1]


def test_what_a_link_leads_to_is_in_the_checksum(tmp_path: Path) -> None:
    tar = write(tmp_path / "t.tar", [file("1.jpg", b"one"), link("2.jpg", "1.jpg")])
    found = index_tar(tar)
    content = bytearray(tar.read_bytes())
    content[512] ^= 1
    tar.write_bytes(content)
    assert [str(one).rpartition(": ")[2] for one in samples(tar, found)] == ["its checksum is not the index's"] * 2


def test_links_to_nothing_and_rings_of_them_are_lost_by_name(tmp_path: Path) -> None:
    members = [
        file("0.jpg"),
        link("1.jpg", "gone.jpg"),
        link("2.jpg", "3.jpg", tarfile.SYMTYPE),
        link("3.jpg", "2.jpg", tarfile.SYMTYPE),
        link("4.jpg", "5.jpg"),
        file("5.jpg"),
        link("6.jpg", "/etc/hostname", tarfile.SYMTYPE),
        link("7.jpg", "folder"),
        file("folder", b"", tarfile.DIRTYPE),
    ]
    found = index_tar(write(tmp_path / "t.tar", members))
    assert [key.decode() for key in found.members.keys_n[found.members.length_n < 0]] == ["1", "2", "3", "4", "6", "7"]
    assert [line.partition(":")[0] for line in found.damage] == ["1", "2", "3", "4", "6", "7"]
    assert "its .jpg is a link to gone.jpg, which is no file of the tar" in found.damage[0]


def test_members_of_one_name_are_samples_of_their_own(tmp_path: Path) -> None:
    """Of eight, one was left."""
    tar = write(tmp_path / "t.tar", [file("same.jpg", bytes([k])) for k in range(8)])
    found = index_tar(tar)
    assert [bytes(one.member(("jpg",))[1]) for one in samples(tar, found) if isinstance(one, RawSample)] == [
        bytes([k]) for k in range(8)
    ]
    assert found.passed_over == ["keys that are there twice in a row, each time a sample: 7, the first same"]
    pairs = [file(f"same.{extension}", bytes([k])) for k in range(3) for extension in ("jpg", "cls")]
    assert len(index_tar(write(tmp_path / "t.tar", pairs)).members) == 3
    mixed = [file("a.jpg", b"1"), file("a.jpg", b"2"), file("a.cls", b"1"), file("a.cls", b"2"), file("b.jpg")]
    found = index_tar(write(tmp_path / "t.tar", mixed))
    assert found.members.length_n.tolist() == [-1, -1, -1, 0]
    assert "nothing tells which of them belong together" in found.damage[0]
    apart = [file("a.jpg"), file("b.jpg"), file("a.cls"), file("b.cls")]
    found = index_tar(write(tmp_path / "t.tar", apart))
    assert found.passed_over == [
        "keys that are there again behind other samples, each of these one more: 2, the first a"
    ]


@pytest.mark.parametrize("between", [0, 512, 10240, 3 << 20])
def test_archives_behind_the_first_are_read(tmp_path: Path, between: int) -> None:
    """`cat a.tar b.tar` lost b without a word."""
    parts = [write(tmp_path / f"{k}.tar", [file(f"{k}{n}.jpg", bytes([k, n])) for n in range(3)]) for k in range(3)]
    tar = tmp_path / "t.tar"
    tar.write_bytes(bytes(between).join(part.read_bytes() for part in parts))
    found = index_tar(tar)
    assert found.damage == []
    assert values(tar, found) == from_library(tar, ignore_zeros=True)
    assert len(found.members) == 9
    assert found.passed_over[0].startswith("further tars behind the end of the first, which are read: 2")


def test_what_follows_the_end_and_is_no_tar_is_told(tmp_path: Path) -> None:
    tar = write(tmp_path / "t.tar", [file("a.jpg"), file("b.jpg")])
    tar.write_bytes(tar.read_bytes() + b"signed" * 200)
    found = index_tar(tar)
    assert (len(found.members), found.damage) == (2, [])
    assert found.passed_over == ["bytes behind the end of the tar that are none: 1, the first at byte 10240"]


def test_what_is_no_part_of_a_sample_is_counted_and_splits_none(tmp_path: Path) -> None:
    """AppleDouble files made four samples of one."""
    members = [file("d", b"", tarfile.DIRTYPE), file("d/.DS_Store"), file("d/README"), file("__MACOSX/d/x.jpg")]
    for k in range(3):
        for extension in ("jpg", "cls"):
            members += [file(f"d/._{k}.{extension}"), file(f"d/{k}.{extension}", bytes([k]))]
    members += [file("dev.jpg", b"", tarfile.CHRTYPE), file("pipe.jpg", b"", tarfile.FIFOTYPE)]
    tar = write(tmp_path / "t.tar", members)
    found = index_tar(tar)
    assert values(tar, found) == values(tar, found, "cls") == {f"d/{k}": bytes([k]) for k in range(3)}
    assert found.damage == []
    assert found.passed_over == [
        "folders: 1, the first d",
        "hidden files: 1, the first d/.DS_Store",
        "files without an extension: 1, the first d/README",
        "files in __MACOSX: 1, the first __MACOSX/d/x.jpg",
        "AppleDouble files (._*): 6, the first d/._0.jpg",
        "devices and pipes: 2, the first dev.jpg",
    ]


names = st.lists(
    st.sampled_from(["a", "b.c", "ä", "x" * 120, "d/e", "d" * 90 + "/" + "f" * 90]), min_size=1, max_size=3
)
contents = st.sampled_from([b"", b"1", b"0" * 511, b"0" * 512, b"0" * 513, b"0" * 5000])


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(FORMATS),
    made=st.lists(st.tuples(names, contents), min_size=1, max_size=8),
    headers=st.booleans(),
)
def test_every_member_has_the_bytes_that_the_library_gives(
    tmp_path_factory: pytest.TempPathFactory,
    kind: int,
    made: list[tuple[list[str], bytes]],
    headers: bool,
) -> None:
    members = []
    for k, (parts, content) in enumerate(made):
        info, content = file(f"{'/'.join(parts)[:200]}-{k}.jpg".replace(".c", "c"), content)
        if headers:
            info.pax_headers = {"comment": "x" * 700, "mtime": "1.5"}
        members.append((info, content))
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    try:
        write(path, members, kind)
    except ValueError:  # names that this format cannot hold
        return
    found = index_tar(path)
    assert found.damage == []
    read = [one for one in samples(path, found) if isinstance(one, RawSample)]
    assert {one.key: int(size) for one, size in zip(read, found.members.member_size_ne[:, 0], strict=True)} == {
        key: len(value) for key, value in from_library(path).items()
    }
    whole = {one.key: bytes(one.member(("jpg",))[1]) for one, (_, value) in zip(read, members, strict=True) if value}
    assert whole == {key: value for key, value in from_library(path).items() if value}


def with_size(name: str, size: bytes) -> bytes:
    """A header that states `size`, 12 bytes, with a right checksum."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT)[:512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize(
    "size",
    [b"\x80" + b"\0" * 3 + b"\xff" * 8, b"\xff" * 11 + b"\0", b"\xff" * 12, b"77777777777\0", b"\x80" + b"\xff" * 11],
)
def test_sizes_that_cannot_be_lose_one_sample_and_end(tmp_path: Path, size: bytes) -> None:
    """A negative size led the library back to the header before it, for ever."""
    before, after = (
        write(tmp_path / name, [file(f"{name}{k}.jpg") for k in range(2)]).read_bytes()[:2048] for name in "xz"
    )
    tar = tmp_path / "t.tar"
    tar.write_bytes(before + with_size("y.jpg", size) + after + bytes(1024))
    found = index_tar(tar)
    whole = {key.decode() for key in found.members.keys_n[found.members.length_n >= 0]}
    assert {"x0", "x1"} <= whole <= {"x0", "x1", "z0", "z1"}
    assert found.damage


def test_a_sparse_map_that_contradicts_itself_loses_its_sample(tmp_path: Path) -> None:
    with (tmp_path / "1.jpg").open("wb") as stream:
        stream.write(b"1" * 4096)
        stream.seek(1 << 20)
        stream.write(b"2" * 4096)
    tar = tmp_path / "t.tar"
    subprocess.run(
        ["tar", "-S", "--hole-detection=raw", "--format=gnu", "-C", tmp_path, "-cf", tar, "1.jpg"], check=True
    )
    content = bytearray(tar.read_bytes())
    assert content[156:157] == b"S"
    content[386:398] = b"00007777777\0"  # where the first piece goes
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    tar.write_bytes(content)
    found = index_tar(tar)
    assert found.members.length_n.tolist() == [-1]
    assert "its map contradicts itself" in found.damage[0]


def test_a_compressed_tar_is_refused_by_its_kind(tmp_path: Path) -> None:
    tar = write(tmp_path / "t.tar", [file("a.jpg")])
    tar.write_bytes(gzip.compress(tar.read_bytes()))
    with pytest.raises(DataError, match=r"t\.tar is compressed \(gzip\).*Decompress"):
        index_tar(tar)


def test_a_member_is_measured_as_it_is_read(tmp_path: Path) -> None:
    """Of a sample with two recordings the one was measured and the other read."""
    members = [file("a.flac", b"1"), file("a.wav", b"22"), file("b.wav", b"333"), file("b.flac", b"4444")]
    tar = write(tmp_path / "t.tar", members)
    found = index_tar(tar, lambda held: len(next(iter(held.values()))))
    read = [one.member(("wav", "flac"))[1] for one in samples(tar, found) if isinstance(one, RawSample)]
    assert [len(content) for content in read] == found.members.length_n.tolist() == [1, 4]


@pytest.mark.parametrize("length", [-5, 2**63 - 1, 2**64])
def test_a_length_that_cannot_be_is_none(tmp_path: Path, length: int) -> None:
    """A FLAC that does not know its length counted 9.2e18 samples, or ended the indexing."""
    tar = write(tmp_path / "t.tar", [file("a.flac"), file("b.flac")])
    found = index_tar(tar, lambda held: length)
    assert found.members.length_n.tolist() == [-1, -1]
    assert "which was not read" in found.damage[0]


def test_a_shard_of_many_lost_samples_names_a_hundred(tmp_path: Path) -> None:
    found = index_tar(write(tmp_path / "t.tar", [file(f"{k}.jpg") for k in range(150)]), lambda held: -1)
    assert len(found.damage) == 101
    assert found.damage[-1] == "and 50 more"


def test_an_index_of_the_first_format_is_read_and_what_it_trusted_is_not(tmp_path: Path) -> None:
    """It took the stored bytes of a sparse member, and what lies behind them, for its content."""
    source = tmp_path / "1.jpg"
    with source.open("wb") as stream:
        stream.write(b"1" * 4096)
        stream.seek(65536)
        stream.write(b"2" * 4096)
    (tmp_path / "2.jpg").write_bytes(b"GNU.sparse." * 2000)
    for options in ("--format=gnu", "--format=pax"):
        tar = tmp_path / "t.tar"
        subprocess.run(
            ["tar", "-S", "--hole-detection=raw", options, "-C", tmp_path, "-cf", tar, "1.jpg", "2.jpg"], check=True
        )
        with tarfile.open(tar) as opened:
            infos = opened.getmembers()
        content = tar.read_bytes()
        ends = [min(info.offset_data + info.size, len(content)) for info in infos]
        starts = [info.offset for info in infos]
        arrays = {
            "keys_n": np.array([b"1", b"2"]),
            "start_n": np.array(starts),
            "size_n": np.array(ends) - starts,
            "crc_n": np.array([zlib.crc32(content[a:b]) for a, b in zip(starts, ends, strict=True)]),
            "length_n": np.array([2**63 - 1, 7]),
            "extensions": np.array(["jpg"]),
            "offset_ne": np.array([[info.offset_data - info.offset] for info in infos]),
            "member_size_ne": np.array([[info.size] for info in infos]),
        }
        np.savez(tmp_path / "t.npz", format=np.int64(1), **arrays)
        os.replace(tmp_path / "t.npz", tmp_path / "t.index")
        members = Members.load(tmp_path / "t.index")
        assert members.format == 1
        assert members.length_n.tolist() == [-1, 7]
        members.length_n[0] = 5
        with pytest.raises(SampleFault, match="is stored sparse, and its index is of an earlier version"):
            read_sample("t", reader(content), members, 0)
        sample = read_sample("t", reader(content), members, 1)
        assert bytes(sample.member(("jpg",))[1]) == b"GNU.sparse." * 2000
