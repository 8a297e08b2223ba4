"""Predictions beside their targets, in training and in evaluation alike."""

from collections.abc import Sequence

from torch import Tensor

from d2v_scale.batch import Batch, masked_targets
from d2v_scale.data2vec import loss
from d2v_scale.data2vec.targets import Made, Target


def compare(
    batch: Batch, targets: Sequence[Target], predictions: Sequence[Tensor], made: Sequence[Made]
) -> list[loss.Compared]:
    """Every target of a micro-batch at its predicted positions beside its predictions, in training and evaluation.
    `predictions`: at all masked positions."""
    return [
        loss.Compared(
            target.config.called,
            target.config.weight,
            batch.layout.predicted(x_nd),
            masked_targets(one.targets_btd, batch),
        )
        for target, x_nd, one in zip(targets, predictions, made, strict=True)
    ]
