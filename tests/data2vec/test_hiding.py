"""Which parts of paired samples are hidden altogether."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from d2v_scale.data2vec.hiding import hidden_parts


@settings(max_examples=60, deadline=None)
@given(
    present_bp=arrays.arrays(bool, st.tuples(st.integers(1, 5), st.integers(2, 4))),
    probability=st.floats(0, 1),
    clones=st.integers(1, 3),
    step=st.integers(0, 9),
)
def test_never_all_parts_and_never_one_that_is_not_there(
    present_bp: np.ndarray, probability: float, clones: int, step: int
) -> None:
    ids = np.arange(len(present_bp)) * 7
    hidden_rp = hidden_parts(probability, present_bp, clones, sample_ids=ids, seed=3, step=step)
    present_rp = np.repeat(present_bp, clones, axis=0)
    assert not (hidden_rp & ~present_rp).any()
    assert (present_rp & ~hidden_rp).any(axis=1)[present_rp.any(axis=1)].all()
    # A row's draw is its own: beside other samples it is the same.
    last = hidden_parts(probability, present_bp[-1:], clones, sample_ids=ids[-1:], seed=3, step=step)
    assert np.array_equal(last, hidden_rp[-clones:])


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_parts_are_hidden_as_often_as_asked(probability: float) -> None:
    present_bp = np.ones((4000, 2), dtype=bool)
    hidden_rp = hidden_parts(probability, present_bp, 2, sample_ids=np.arange(4000), seed=0, step=1)
    both = probability**2
    # Where all would be hidden one is shown: half of those times this one.
    assert hidden_rp.mean(axis=0) == pytest.approx([probability - both / 2] * 2, abs=0.02)
    other = hidden_parts(probability, present_bp, 2, sample_ids=np.arange(4000), seed=0, step=2)
    assert probability in (0, 1) or (other != hidden_rp).any()
