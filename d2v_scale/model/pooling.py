"""One vector of all positions."""

from torch import Tensor


def mean_over_positions(x_btd: Tensor, valid_bt: Tensor | None) -> Tensor:
    """(B, D) float32: the mean over the valid positions of every row."""
    x_btd = x_btd.float()
    if valid_bt is None:
        return x_btd.mean(dim=1)
    weights_bt1 = valid_bt.unsqueeze(-1).to(x_btd.dtype)
    return (x_btd * weights_bt1).sum(dim=1) / weights_bt1.sum(dim=1).clamp(min=1)
