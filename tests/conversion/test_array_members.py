"""Files of arrays as members: nothing of the values is lost, and a slice can be read where they lie."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_shards import npy

from d2v_scale.conversion.array_members import ArrayReading, Layout, array_members
from d2v_scale.shards.array_files import npy_of

TYPES = ["?", "<i1", "<u2", ">u2", "<i8", ">i4", "<f2", ">f4", "<f4", "<f8", ">f8"]


def npz(compressed: bool, **arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, **arrays)  # type: ignore[arg-type]
    return out.getvalue()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_type_shape_and_values_survive_and_order_and_bytes_are_one(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    kind, order = data.draw(st.sampled_from(TYPES)), data.draw(st.sampled_from(["C", "F"]))
    values = np.random.default_rng(data.draw(st.integers(0, 9))).integers(-100, 100, shape)
    given = np.asarray(values.astype(kind), order=order)
    how = data.draw(st.sampled_from(["npy", "npz", "npz of several"]))
    content = npy(given) if how == "npy" else npz(len(shape) % 2 == 0, x=given)
    if how == "npz of several":
        content = npz(True, y=given[:1], x=given)
    reading = ArrayReading("x" if how == "npz of several" else None, layout=Layout(shape[0], len(shape) - 1))
    assert reading.shape(content, how[:3]) == shape
    members = array_members(content, how[:3], reading)
    assert list(members) == ["npy"]
    stored = np.load(io.BytesIO(members["npy"]))
    np.testing.assert_array_equal(stored, given)
    header = npy_of(members["npy"]).header
    assert (header.shape, header.dtype, header.fortran_order) == (shape, np.dtype(kind).newbyteorder("<"), False)
    assert header.dtype.str[0] in "<|"
    assert len(members["npy"]) == header.start + given.nbytes  # not compressed, nothing behind it


def test_nan_and_signed_zero_are_kept_bit_by_bit() -> None:
    given = np.array([[np.nan, -0.0, 5e-324]], dtype=">f8")
    assert np.load(io.BytesIO(array_members(npy(given), "npy", ArrayReading())["npy"])).tobytes() == (
        given.astype("<f8").tobytes()
    )


@pytest.mark.parametrize(
    ("extension", "content", "said"),
    [
        ("npy", b"", "is empty"),
        ("npz", b"", "is empty"),
        ("npy", b"\x93NUMPY", "is no .npy file"),
        ("npy", npy(np.zeros((2, 9)))[:-1], "is cut off"),
        ("npy", npy(np.array(3.0)), r"has the shape \(\)"),
        ("npy", npy(np.zeros(9)), r"has the shape \(9,\)"),
        ("npy", npy(np.zeros((2, 0))), "in which there is nothing"),
        ("npy", npy(np.array([[{}]], dtype=object)), "pickled objects, which are never loaded"),
        ("npy", npy(np.zeros((2, 9), dtype=complex)), "real and imaginary parts as channels"),
        ("npy", npy(np.array([["a"]])), "no real numbers"),
        ("npy", npy(np.zeros((2, 9), dtype="M8[s]")), "no real numbers"),
        ("npy", npy(np.zeros((2, 9), dtype=[("a", "f4")])), "no real numbers"),
        ("npz", b"no zip", "is no .npz that can be read"),
        ("npz", npz(True, x=np.zeros((2, 9)), y=np.zeros((2, 9))), r"holds 2 arrays \(x, y\): name one"),
        ("npz", npz(True, x=np.array([[{}]], dtype=object)), "pickled objects"),
        ("npy", npy(np.zeros((3, 9))), "has 3 channels and 1 axis; its set has 2 channels and 1 axis"),
        ("npy", npy(np.zeros((2, 9, 9))), "has 2 channels and 2 axes; its set has 2 channels and 1 axis"),
        ("csv", b"1,2,3\n", "has 3 channels and 1 axis; its set"),
    ],
)
def test_what_is_no_sample_of_the_set_is_refused_in_words(extension: str, content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        array_members(content, extension, ArrayReading(layout=Layout(2, 1)))
