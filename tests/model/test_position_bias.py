"""Position biases against their definitions."""

import inspect

import pytest
import torch

from d2v_scale.model.init import initialize
from d2v_scale.model.position_bias import (
    AlibiBias,
    RelativeBias,
    add_padding,
    aligned,
    relative_index,
    sincos_positions,
    slope_exponents,
)

pytestmark = pytest.mark.usefixtures("world_of_one")


def test_alibi_after_gather_is_minus_slope_times_original_distance() -> None:
    bias = AlibiBias(12)
    with torch.no_grad():
        bias.scale.copy_(torch.linspace(-0.5, 2.0, 12))
    kept_rs = torch.tensor([[0, 3, 4, 9], [1, 2, 7, 8]])
    slopes = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    out = bias(kept_rs)
    for row in range(2):
        for head in range(12):
            scale = max(0.0, float(bias.scale[head].detach()))
            for i in range(4):
                for j in range(4):
                    expected = -scale * slopes[head] * abs(int(kept_rs[row, i] - kept_rs[row, j]))
                    assert float(out[row, head, i, j].detach()) == pytest.approx(expected, rel=1e-6)


def test_alibi_slopes_survive_a_cast_to_bf16() -> None:
    for heads in (4, 12, 16, 20):
        exponents = torch.tensor(slope_exponents(heads))
        assert torch.equal(exponents, exponents.bfloat16().float())
    assert slope_exponents(16)[:2] == [0.5, 1.0]
    assert len(slope_exponents(20)) == 20


def test_relative_index_tells_apart_exactly_what_the_table_has_rows_for() -> None:
    grid = 14
    index = relative_index((grid, grid))
    assert index.unique().numel() == 732
    assert int(index[0, 0]) == 731
    assert set(index[0, 1:].tolist()) == {729}
    assert set(index[1:, 0].tolist()) == {730}
    i, j = (5, 3), (2, 9)
    row = (i[0] - j[0] + 13) * 27 + i[1] - j[1] + 13
    assert int(index[1 + i[0] * grid + i[1], 1 + j[0] * grid + j[1]]) == row


def test_several_extra_tokens_share_their_rows_and_none_has_none() -> None:
    one, two, none = (relative_index((2, 3), extra) for extra in (1, 2, 0))
    assert torch.equal(none, one[1:, 1:])
    assert torch.equal(none, two[2:, 2:])
    assert torch.equal(two[[0, 1]][:, 2:], one[[0, 0]][:, 1:])
    assert torch.equal(two[2:, :2], one[1:][:, [0, 0]])
    assert set(two[:2, :2].flatten().tolist()) == {int(one[0, 0])}
    for extra, index in ((1, one), (2, two), (0, none)):
        assert RelativeBias((2, 3), 4, extra=extra).parameter_shape[0] == int(index.max()) + 1


def test_relative_index_of_a_wide_grid_is_that_of_beit() -> None:
    from transformers.models.data2vec.modeling_data2vec_vision import Data2VecVisionRelativePositionBias

    of_grid = Data2VecVisionRelativePositionBias.generate_relative_position_index
    itself = (
        [None] if "self" in inspect.signature(of_grid).parameters else []
    )  # of transformers 5.0, which reads nothing
    for grid in ((2, 5), (5, 2), (3, 3)):
        theirs = of_grid(*itself, grid)
        assert torch.equal(relative_index(grid), theirs)
        assert RelativeBias(grid, 4).parameter_shape == (int(theirs.max()) + 1, 4)


def test_relative_bias_is_a_lookup() -> None:
    bias = RelativeBias((3, 3), 4)
    initialize(bias, 0)
    with torch.no_grad():
        bias.table.copy_(torch.randn_like(bias.table))
    out = bias()
    assert out.shape == (1, 4, 10, 10)
    assert torch.equal(out[0, 2], bias.table[:, 2][bias.index])


def test_sincos_encodes_the_column_first() -> None:
    positions = sincos_positions(8, (3, 3))
    assert positions.shape == (9, 8)
    row_major = positions.view(3, 3, 8)
    assert torch.equal(row_major[0, :, :4], row_major[2, :, :4])
    assert torch.equal(row_major[:, 0, 4:], row_major[:, 2, 4:])
    expected = torch.tensor([2.0, 2.0 / 100]).sin()
    assert torch.allclose(row_major[1, 2, :2], expected)


def test_sincos_of_any_grid_gives_each_axis_its_share_of_the_channels() -> None:
    square, wide = sincos_positions(8, (5, 5)).view(5, 5, 8), sincos_positions(8, (2, 5)).view(2, 5, 8)
    assert torch.equal(wide, square[:2])
    line = sincos_positions(4, (5,))
    assert torch.equal(line, square[0, :, :4])
    tube = sincos_positions(12, (3, 2, 5)).view(3, 2, 5, 12)
    assert torch.equal(tube[1, :, :, :8], tube[2, :, :, :8])
    assert torch.equal(tube[..., :4], line.expand(3, 2, 5, 4))
    assert torch.equal(tube[:, 0, 0, 8:], line[:3])


def test_relative_table_starts_from_zero_unless_a_spread_is_asked_for() -> None:
    zeros, spread = RelativeBias((3, 3), 4), RelativeBias((3, 3), 4, 1.0)
    initialize(zeros, 1)
    initialize(spread, 1)
    assert zeros.table.abs().max() == 0
    assert 0.7 < spread.table.std() < 1.3


@pytest.mark.parametrize("length", [15, 16, 197])
def test_aligned_rows_have_the_same_values_and_gradients(length: int) -> None:
    bias_rhss = torch.randn(2, 3, length, length, requires_grad=True)
    out = aligned(bias_rhss)
    assert torch.equal(out, bias_rhss)
    assert out.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in out.stride()[:-1])
    weight = torch.randn_like(out)
    (gradient,) = torch.autograd.grad((out * weight).sum(), bias_rhss)
    assert torch.equal(gradient, weight)
    assert aligned(out) is out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("padded", [False, True])
def test_one_bias_for_all_blocks_is_aligned_on_a_gpu(padded: bool) -> None:
    """Attention copied a bias of 197 positions to aligned rows in every block."""
    valid_rs = torch.ones(2, 197, dtype=torch.bool, device="cuda") if padded else None
    bias = add_padding(torch.zeros(1, 3, 197, 197, device="cuda"), valid_rs, torch.bfloat16)
    assert bias is not None
    assert bias.stride()[-2:] == (200, 1)


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_sincos_tells_positions_of_one_to_four_axes_apart(grid: tuple[int, ...]) -> None:
    """Of 50 channels, which three and four axes cannot share equally: what is left over is 0."""
    positions = sincos_positions(50, grid)
    share = 50 // (2 * len(grid))
    assert positions.unique(dim=0).shape == positions.shape == (torch.tensor(grid).prod(), 50)
    assert not positions[:, 2 * share * len(grid) :].any()
    last = torch.arange(positions.shape[0]) % grid[-1]
    assert torch.allclose(positions[:, 0], last.double().sin().float())
