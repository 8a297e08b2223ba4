"""What of an array no training could use, said in words."""

import numpy as np
import pytest
from small_shards import npy, npz

from d2v_scale.conversion.measures import measure_of
from d2v_scale.modalities.array import members


def test_the_length_is_the_extent_of_the_first_axis_after_the_channels() -> None:
    measure = measure_of("array")
    series = np.zeros((12, 29), dtype=np.int16)
    assert measure({"npy": npy(series), "cls": b"1"}) == 29
    assert measure({"npz": npz(x=series)}) == 29
    assert members.measure({"npz": npz(x=series, y=series[:, :5])}, "y") == 5
    assert measure({"npy": npy(np.zeros((1, 4, 5, 6, 7), dtype=bool))}) == 4


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"txt": b"a"}, "has no .npy, .npz"),
        ({"npy": b""}, "is empty"),
        ({"npy": b"no array at all"}, "is no .npy file"),
        ({"npy": npy(np.zeros(5))}, r"has the shape \(5,\), which is not one of channels and 1 to 4 axes"),
        ({"npy": npy(np.zeros((1, 2, 2, 2, 2, 2)))}, "channels and 1 to 4 axes"),
        ({"npy": npy(np.zeros((3, 0)))}, "in which there is nothing"),
        ({"npy": npy(np.array([[{}]], dtype=object))}, "pickled objects, which are never loaded"),
        ({"npy": npy(np.zeros((1, 2), dtype=complex))}, "no real numbers"),
        ({"npy": npy(np.full((1, 2), np.nan))}, "nothing but NaN"),
        ({"npy": npy(np.full((1, 2), 1e300))}, "infinite, or too large for 32-bit numbers"),
        ({"npz": npz(x=np.zeros((1, 2)), y=np.zeros((1, 2)))}, r"holds 2 arrays \(x, y\): name one"),
    ],
)
def test_an_array_that_no_training_could_use_is_refused_in_words(held: dict[str, bytes], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        measure_of("array")(held)
