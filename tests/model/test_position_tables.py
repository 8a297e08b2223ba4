"""A table of positions, laid over another grid."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.model.position_tables import PositionTable

GRIDS = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def values_of(table: PositionTable, extra: int, seed: int) -> torch.Tensor:
    return torch.randn(table.places + extra, 3, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.booleans(), st.integers(0, 3), st.booleans(), st.integers(0, 9), st.data())
def test_any_grid_is_laid_over_any_other(grid, offsets, extra, non_negative, seed, data) -> None:
    """Other rows stay; a constant stays one; what is not negative stays so; the same grid changes nothing."""
    target = tuple(data.draw(st.integers(1, 6)) for _ in grid)
    old, new = (PositionTable(tuple(size), offsets) for size in (grid, target))
    values = values_of(old, extra, seed)
    found = old.laid_over(values, new, non_negative=non_negative)
    assert found.shape == (new.places + extra, 3)
    assert torch.equal(found[new.places :], values[old.places :])
    torch.testing.assert_close(old.laid_over(torch.full_like(values, 2.5), new), torch.full_like(found, 2.5))
    assert torch.equal(old.laid_over(values, old), values)
    assert (old.laid_over(values.square(), new, non_negative=True) >= 0).all()


@pytest.mark.parametrize(("old", "new"), [((4, 6), (8, 9)), ((7, 3), (5, 2)), ((2, 5), (2, 11))])
def test_the_offset_zero_stays_where_it_is(old: tuple[int, int], new: tuple[int, int]) -> None:
    """A table that is even in every offset stays even, with its extreme at none."""
    was, wanted = PositionTable(old, offsets=True), PositionTable(new, offsets=True)
    lines = [torch.linspace(-1, 1, extent).square() for extent in was.extents]
    values = (lines[0][:, None] + lines[1]).reshape(-1, 1)
    found = was.laid_over(values, wanted).reshape(wanted.extents)
    torch.testing.assert_close(found, found.flip(0, 1))
    assert found.argmin() == math.prod(wanted.extents) // 2


def test_each_axis_is_interpolated_by_itself() -> None:
    """As images are, where there are two of them."""
    old, new = PositionTable((4, 6)), PositionTable((7, 12))
    values = values_of(old, 0, 1)
    image = values.reshape(4, 6, 3).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(image, (7, 12), mode="bicubic", align_corners=False)
    torch.testing.assert_close(old.laid_over(values, new), expected[0].permute(1, 2, 0).reshape(-1, 3))
