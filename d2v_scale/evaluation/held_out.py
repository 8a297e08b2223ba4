"""The masked loss on samples that are not trained on, under masks that never change: learning without a single label.

The targets move with the teacher, so the loss of two steps is of two tasks. The share of the targets' variance that the
predictions explain is comparable over a run, and falls to nothing when targets collapse.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.data.batch import Batch
from d2v_scale.data2vec import loss
from d2v_scale.data2vec.config import LossConfig
from d2v_scale.model.stack import Draw, Student
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.step import masked_targets
from d2v_scale.teacher import EmaTeacher, ShardedTeacher


@torch.no_grad()
def held_out_figures(
    batches: Sequence[Batch], student: StudentEngine, teacher: EmaTeacher, config: LossConfig
) -> dict[str, float]:
    """`held_out_loss` (mean over masked positions) and `held_out_explained` (1 - squared error / variance of targets).

    Each data-parallel rank computes every W-th batch. Not measured in a pipeline, where it is empty. Collective: all
    ranks must call; all get the same.
    """
    topology = student.topology
    if not isinstance(teacher, ShardedTeacher):
        return {}
    rank, size = topology.data_parallel_rank, topology.data_parallel_size
    module = cast(Student, student.module)
    was_training = module.training
    module.eval()
    sums: Tensor | None = None
    for turn in range(-(-len(batches) // size)):
        # A rank that has run out repeats its last batch and counts it as nothing: a sharded forward needs every rank.
        index = turn * size + rank
        batch = batches[min(index, len(batches) - 1)].to(topology.device)
        output = module(batch, Draw(0, 0))
        targets_nd = masked_targets(teacher(batch, output.features_btd), batch)
        part = _sums(output.predictions_nd, targets_nd, config) * float(index < len(batches))
        sums = part if sums is None else sums + part
    module.train(was_training)
    assert sums is not None, "no batch to measure"
    if size > 1:
        dist.all_reduce(sums, group=topology.data_parallel_group)
    count, total, error = sums[:3].tolist()
    sum_d, square_d = sums[3:].chunk(2)
    variance = float((square_d - sum_d.square() / max(1.0, count)).sum())
    return {"held_out_loss": total / max(1.0, count), "held_out_explained": 1 - error / max(variance, 1e-12)}


def _sums(predictions_nd: Tensor, targets_nd: Tensor, config: LossConfig) -> Tensor:
    """float64 (3 + 2 D,): positions, loss, squared error, and each channel's sum and sum of squares of the targets."""
    predictions_nd, targets_nd = predictions_nd.double(), targets_nd.double()
    count, width = targets_nd.shape
    scalars = (
        torch.tensor(float(count), device=targets_nd.device),
        loss.masked_loss_sum(predictions_nd, targets_nd, config, width),
        (predictions_nd - targets_nd).square().sum(),
    )
    moments = (targets_nd.sum(0), targets_nd.square().sum(0))
    return torch.cat((torch.stack([value.double() for value in scalars]), *moments))
