"""Arrays in files: headers alone, slices that read nothing else, and everything that is no array of numbers."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.shards import array_files
from d2v_scale.shards.array_files import npy_in, npy_of, npz_header, npz_keys, npz_of, open_npy
from d2v_scale.shards.reading import SampleFault, SampleStore
from d2v_scale.shards.shard_index import index_tar

TYPES = ["?", "<i1", "<u2", ">u2", "<i8", ">i4", "<f2", ">f4", "<f4", "<f8", ">f8"]


def stored(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, array, version=version, allow_pickle=True)
    return content.getvalue()


class Counted:
    """Bytes that count what is read of them."""

    def __init__(self, content: bytes) -> None:
        self.content, self.read, self.calls = content, 0, 0

    def __call__(self, start: int, size: int) -> bytes:
        part = self.content[start : start + size]
        self.read, self.calls = self.read + len(part), self.calls + 1
        return part


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    shape = tuple(draw(st.lists(st.integers(0, 6), min_size=0, max_size=4)))
    values = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 100, shape).astype(draw(st.sampled_from(TYPES)))
    return np.asarray(values, order=draw(st.sampled_from(["C", "F"])))


@given(arrays(), st.sampled_from([(1, 0), (2, 0), (3, 0)]), st.sampled_from([0, 8, 1 << 12]), st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_read_is_what_numpy_reads(array: np.ndarray, version: tuple, gap: int, data: st.DataObject) -> None:
    content = stored(array, version)
    file = npy_of(content)
    assert (file.header.shape, file.header.dtype) == (array.shape, array.dtype)
    whole = file.whole()
    np.testing.assert_array_equal(whole, np.load(io.BytesIO(content)))
    assert whole.dtype == array.dtype.newbyteorder("=")
    assert whole.flags.c_contiguous
    assert whole.flags.writeable
    if array.ndim == 0:
        with pytest.raises(ValueError, match=r"no axis 0: its shape is \(\)"):
            file.slice(0, 0, 0)
        return
    axis = data.draw(st.integers(-array.ndim, array.ndim - 1))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, array.shape[axis])] * 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_files, "_JOINED_GAP", gap)
        part = file.slice(axis, start, stop)
    np.testing.assert_array_equal(part, array.take(range(start, stop), axis=axis))
    assert part.dtype == whole.dtype
    with pytest.raises(ValueError, match="has no positions"):
        file.slice(axis, start, array.shape[axis] + 1)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_crop_of_a_long_array_reads_its_header_and_its_slice_alone(order: str, axis: int) -> None:
    shape = (100_000, 8) if axis == 0 else (8, 100_000)
    array = np.asarray(np.arange(800_000, dtype=np.float32).reshape(shape), order=order)  # type: ignore[call-overload]
    read_at = Counted(stored(array))
    file = open_npy(read_at, len(read_at.content))
    assert (read_at.read, read_at.calls) == (256, 1)
    crop = file.slice(axis, 5000, 5250)
    np.testing.assert_array_equal(crop, array.take(range(5000, 5250), axis=axis))
    along_fastest = (order == "C") == (axis == 1)
    assert read_at.read == 256 + 250 * 8 * 4, "of 3.2 MB"
    assert read_at.calls == 1 + (8 if along_fastest else 1)


def test_parts_that_lie_close_together_are_read_at_once() -> None:
    array = np.arange(64 * 300, dtype=np.float32).reshape(64, 300)
    read_at = Counted(stored(array))
    np.testing.assert_array_equal(open_npy(read_at, len(read_at.content)).slice(1, 10, 40), array[:, 10:40])
    assert read_at.calls == 2


def header(text: str, version: int = 1, magic: bytes = b"\x93NUMPY") -> bytes:
    width = 2 if version == 1 else 4
    return magic + bytes([version, 0]) + len(text).to_bytes(width, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no .npy file"),
        (b"\x93NUM", "is no .npy file"),
        (b"RIFF" + bytes(100), "is no .npy file"),
        (pickle.dumps([1, 2, 3]), "is no .npy file"),
        (stored(np.array([{"a": 1}, None], dtype=object)), "pickled objects, which are never loaded"),
        (stored(np.zeros(3, dtype=[("a", "f4"), ("b", "O")])), "pickled objects"),
        (stored(np.zeros(3, dtype=[("a", "f4")])), "no real numbers"),
        (stored(np.zeros(3, dtype=[("ä", "f4")]), (3, 0)), "no real numbers"),
        (stored(np.array(["a", "b"])), "type <U1, which are no real numbers"),
        (stored(np.array(["2020-01-01"], dtype="M8[D]")), "no real numbers"),
        (stored(np.zeros(3, dtype=np.complex64)), "store real and imaginary parts as channels"),
        (stored(np.zeros((4, 5)))[:-1], "is cut off: 287 of 288 bytes"),
        (stored(np.zeros((4, 5)))[:40], "has no header of an array"),
        (stored(np.zeros((4, 5))) + b"xy", "has 2 bytes behind the end of its array of shape (4, 5)"),
        (stored(np.zeros(3)) + stored(np.zeros(3)), "bytes behind the end"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}"), "has the shape (-1, -4)"),
        (header("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 9999999999)}"), "is cut off"),
        (header("__import__('os').abort()"), "has no header of an array"),
        (header("{'descr': '<f4', 'shape': (1,)}"), "has no header of an array"),
        (header("(" * 9000), "has no header of an array"),
        (header("{'descr': 'nothing', 'fortran_order': False, 'shape': (1,)}"), "has no header of an array"),
        (header(" " * 20000, 2), "has a header of 20012 bytes"),
        (header("{}", 7), "is of version 7.0"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused_in_words(content: bytes, said: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        npy_of(content)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_shrinks_after_its_header_was_read_is_cut_off() -> None:
    content = stored(np.zeros(100))
    held = [content]
    file = open_npy(lambda start, size: held[0][start : start + size], len(content))
    held[0] = content[:500]
    with pytest.raises(ValueError, match="is cut off: 372 of 800 bytes"):
        file.whole()


def zipped(compression: int = zipfile.ZIP_STORED, **arrays: Any) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, array in arrays.items():
            archive.writestr(f"{name}.npy", array if isinstance(array, bytes) else stored(array))
    return content.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_array_of_an_npz_is_had_by_its_name(compression: int) -> None:
    array = np.arange(60_000, dtype=">i2").reshape(3, 20_000)
    content = zipped(compression, signal=array, other=np.zeros(2))
    assert npz_keys(content) == ["signal", "other"]
    assert npz_header(content, "signal").shape == (3, 20_000)
    np.testing.assert_array_equal(npz_of(content, "signal").slice(1, 7, 9), array[:, 7:9])
    with pytest.raises(ValueError, match="has no array 'eeg': it holds other, signal"):
        npz_of(content, "eeg")


def test_a_damaged_npz_is_refused_in_words() -> None:
    content = zipped(zipfile.ZIP_DEFLATED, signal=np.random.default_rng(0).random(1000))
    for damaged in (b"", content[:-30], content[:200] + bytes(500) + content[700:]):
        with pytest.raises(ValueError, match=r"no \.npz that can be read"):
            npz_of(damaged, "signal")
    with pytest.raises(ValueError, match="pickled objects"):
        npz_header(zipped(signal=stored(np.array([None]))), "signal")
    with pytest.raises(ValueError, match="is cut off"):
        npz_header(zipped(signal=stored(np.zeros(9))[:-1]), "signal")


def tar_with(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_a_member_of_a_shard_is_sliced_where_it_lies(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((4, 50_000)).astype(np.float32)
    content = stored(array)
    tar_with(tmp_path / "a.tar", {"one.npy": stored(array[:, :9]), "two.npy": content, "two.cls": b"3"})
    members = index_tar(tmp_path / "a.tar").members
    shards: Any = SimpleNamespace(paths=[str(tmp_path / "a.tar")], members=lambda shard: members)
    store = SampleStore(shards)
    extension, read_at, size = store.member(0, 1, ("npz", "npy"))
    assert (extension, size) == ("npy", len(content))
    counted = Counted(b"")

    def reading(start: int, count: int) -> bytes:
        counted.read += count
        return read_at(start, count)

    np.testing.assert_array_equal(open_npy(reading, size).slice(1, 100, 200), array[:, 100:200])
    assert counted.read == 256 + 4 * 100 * 4
    assert read_at(size - 2, 100) == content[-2:], "never what lies behind the member"
    assert read_at(size + 5, 100) == b""
    with pytest.raises(SampleFault, match=r"two: has no \.flac"):
        store.member(0, 1, ("flac",))
    members.length_n[1] = -1
    with pytest.raises(SampleFault, match="undecodable when the index was made"):
        store.member(0, 1, ("npy",))
    place = int(members.start_n[0] + members.offset_ne[0, 0])
    with npy_in(tmp_path / "a.tar", place, int(members.member_size_ne[0, 0])) as file:
        np.testing.assert_array_equal(file.whole(), array[:, :9])
    store.close()
