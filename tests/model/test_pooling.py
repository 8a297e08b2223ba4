"""The mean over positions."""

import torch

from d2v_scale.model.pooling import mean_over_positions


def test_a_value_at_a_padded_position_that_is_no_number_does_not_reach_the_mean() -> None:
    x_btd = torch.randn(3, 5, 4)
    valid_bt = torch.arange(5) < torch.tensor([[5], [2], [0]])
    expected_bd = torch.stack([x_btd[0].mean(0), x_btd[1, :2].mean(0), torch.zeros(4)])
    for outside in (7.0, float("nan"), float("inf")):
        found_bd = mean_over_positions(x_btd.masked_fill(~valid_bt[..., None], outside), valid_bt)
        torch.testing.assert_close(found_bd, expected_bd, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mean_over_positions(x_btd, None), x_btd.mean(1))
