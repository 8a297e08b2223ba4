"""One vector of all positions."""

from torch import Tensor


def mean_over_positions(x_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
    """(B, D) float32: the mean over the valid positions of every row, whatever is at the others."""
    x_btd = x_btd.float()
    if valid_bt is None:
        return x_btd.mean(dim=1)
    total_bd = x_btd.masked_fill(~valid_bt[..., None], 0.0).sum(dim=1)
    return total_bd / valid_bt.sum(dim=1, keepdim=True).clamp(min=1)
