"""How far predictions are from targets, as sums: the caller divides by counts of the whole step (spec 1.3)."""

from typing import NamedTuple

import torch
from torch import Tensor

from d2v_scale.data2vec.config import LossConfig


class Compared(NamedTuple):
    """One of the targets of a micro-batch at its masked positions, and what was predicted there."""

    name: str
    weight: float
    """Factor on its part of the loss."""
    predictions_nd: Tensor
    targets_nd: Tensor

    def losses(self, config: LossConfig) -> Tensor:
        """float64 (N,): of every position, without the weight."""
        factor = channel_factor(config, self.targets_nd.shape[1])
        return elementwise(self.predictions_nd, self.targets_nd, config.beta).sum(dim=1).double() * factor

    def loss_sum(self, config: LossConfig) -> Tensor:
        """Sum over positions (`masked_loss_sum`), without the weight."""
        return masked_loss_sum(self.predictions_nd, self.targets_nd, config, self.targets_nd.shape[1])


def elementwise(predictions: Tensor, targets: Tensor, beta: float) -> Tensor:
    """fp32 errors of any shape: (x-y)^2 for beta 0, else 0.5 (x-y)^2 / beta below beta and |x-y| - beta/2 above."""
    error = predictions.float() - targets.float()
    if beta == 0:
        return error.square()
    size = error.abs()
    return torch.where(size < beta, 0.5 * error.square() / beta, size - 0.5 * beta)


def channel_factor(config: LossConfig, width: int) -> float:
    """What the sum over `width` channels is multiplied by: `scale`, or 1/sqrt(width); for a mean also 1/width."""
    if config.reduction == "mean_channels":
        return (1.0 if config.scale is None else config.scale) / width
    return width**-0.5 if config.scale is None else config.scale


def masked_loss_sum(predictions_nd: Tensor, targets_nd: Tensor, config: LossConfig, width: int) -> Tensor:
    """Sum over masked positions of the loss of one position; an fp32 scalar, 0 for no positions.

    Divide by the number of masked positions over all ranks and micro-batches of the step: a rank with more of them
    weighs more, and a recipe means the same at any world size.
    """
    return elementwise(predictions_nd, targets_nd, config.beta).sum() * channel_factor(config, width)


def cls_loss_sum(
    predictions_rd: Tensor,
    targets_btd: Tensor,
    config: LossConfig,
    width: int,
    real_bt: Tensor | None = None,
    present_b: Tensor | None = None,
) -> Tensor:
    """Weighted sum over rows of the CLS term (2.0): each row's output at its last extra token against the mean of its
    sample's target over the positions `real_bt`; None: over all T, padding included as in the reference. Samples that
    are not `present_b` count nothing.

    Rows are sample-major, R = B*M. Divide by the number of rows over all ranks and micro-batches of the step, so that
    the term's weight does not depend on the batch size. (The reference sums over the rows of one micro-batch:
    `cls_weight` = its cls_loss times rows per micro-batch.)
    """
    samples = targets_btd.shape[0]
    clones = predictions_rd.shape[0] // max(1, samples)
    targets_bd = targets_btd.float().mean(dim=1) if real_bt is None else _mean_over(targets_btd.float(), real_bt)
    targets_rd = targets_bd.repeat_interleave(clones, dim=0)
    each_rd = elementwise(predictions_rd, targets_rd, config.beta)
    if present_b is not None:
        each_rd = each_rd * present_b.repeat_interleave(clones)[:, None]
    total = each_rd.sum()
    return total * (channel_factor(config, width) * config.cls_weight)


def _mean_over(x_btd: Tensor, real_bt: Tensor) -> Tensor:
    """(B, D): the mean over the positions that are True; zeros of a row without any."""
    x_btd = x_btd * real_bt[..., None]
    return x_btd.sum(dim=1) / real_bt.sum(dim=1, keepdim=True).clamp(min=1)
