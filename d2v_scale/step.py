"""One optimizer step: student forward, teacher forward, loss, backward, verdict, teacher update."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.breakdown import LossBreakdown
from d2v_scale.data.batch import Batch
from d2v_scale.data2vec import ema, loss, statistics
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.data2vec.stateless import key
from d2v_scale.model.stack import Draw, StudentOutput
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StepResult, StudentEngine
from d2v_scale.profiling import part
from d2v_scale.teacher import ShardedTeacher
from d2v_scale.tracking.meters import Stopwatch


@dataclass
class Observations:
    """What the step leaves for the log, on the device and summed over this rank's micro-batches; read when logging."""

    loss: Tensor
    """This rank's share of the step's loss: the sum over ranks is the loss."""
    rows: Tensor
    """Rows (samples times clones) of the whole step."""
    target_moments: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    prediction_moments: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    stem_moments: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    alignment: dict[str, Tensor] = field(default_factory=dict)
    """Effective rank and mean cosine of the last micro-batch's targets and predictions."""
    ema_time: Stopwatch = field(default_factory=Stopwatch)


def count_step(batches: list[Batch], topology: Topology) -> Tensor:
    """Masked positions and rows of the whole step: float64 (2,) on the device, without waiting for it.

    The masks of every micro-batch are drawn before the first forward, so that each can be divided by what all ranks
    will mask. Collective over the data-parallel group: all its ranks must call.
    """
    masked = sum(batch.layout.masked_n.numel() for batch in batches)
    rows = sum(batch.masked_rt.shape[0] for batch in batches)
    counts = torch.tensor([masked, rows], dtype=torch.float64).to(topology.device, non_blocking=True)
    if topology.data_parallel_size > 1:
        dist.all_reduce(counts, group=topology.data_parallel_group)
    return counts.clamp(min=1)


def train_step(
    student: StudentEngine,
    teacher: ShardedTeacher,
    batches: list[Batch],
    objective: ObjectiveConfig,
    draw: Draw,
    *,
    observe: bool,
    breakdown: LossBreakdown | None = None,
) -> tuple[StepResult, Observations]:
    """Run one step over this rank's micro-batches. Collective: all ranks must call, with the same modality.

    The loss is a sum over masked positions divided by their number over all ranks and micro-batches (spec 1.3), so
    every micro-batch's sum is scaled by data-parallel size x accumulation / count: DeepSpeed divides by both.
    `observe` also collects what `collapse` needs.
    `breakdown` gets the loss by source. The teacher moves if and only if the optimizer stepped.
    """
    topology = student.topology
    counts = count_step(batches, topology)
    factor = topology.data_parallel_size * len(batches)
    observations = Observations(torch.zeros((), dtype=torch.float64, device=topology.device), counts[1])
    for micro, batch in enumerate(batches):
        torch.manual_seed(key(draw.seed, "dropout", draw.step, topology.data_parallel_rank, micro) >> 1)
        with part("student"):
            output = student(batch, draw)
        with part("teacher"):
            targets_btd = teacher(batch, output.features_btd)
        targets_nd = masked_targets(targets_btd, batch)
        share = _loss_share(output, targets_btd, targets_nd, objective, counts)
        observations.loss += share.detach()
        with part("backward"):
            student.backward(share * factor)
        if observe:
            _observe(observations, output, targets_nd)
        if breakdown is not None:
            breakdown.add(batch, output.predictions_nd, targets_nd, objective.loss)
    with part("optimizer"):
        result = student.step()
    if result.applied:
        with part("ema"), observations.ema_time:
            teacher.update(ema.decay(objective.ema, student.completed_updates), measure=observe)
    return result, observations


def masked_targets(targets_btd: Tensor, batch: Batch) -> Tensor:
    """Targets (N, D) at the masked positions of all clones, in the order of the predictions."""
    samples, length, width = targets_btd.shape
    masked_n = batch.layout.masked_n
    # Row r of the clones belongs to sample r // M, so position r * T + t reads (r // M) * T + t.
    rows_n = torch.div(masked_n, length * batch.clones, rounding_mode="floor") * length + masked_n % length
    return targets_btd.reshape(samples * length, width).index_select(0, rows_n)


def _loss_share(
    output: StudentOutput, targets_btd: Tensor, targets_nd: Tensor, objective: ObjectiveConfig, counts: Tensor
) -> Tensor:
    width = targets_btd.shape[-1]
    share = loss.masked_loss_sum(output.predictions_nd, targets_nd, objective.loss, width) / counts[0].float()
    if objective.loss.cls_weight > 0:
        assert output.cls_rd is not None, "a CLS loss needs a CLS token"
        share = share + loss.cls_loss_sum(output.cls_rd, targets_btd, objective.loss, width) / counts[1].float()
    return share


def _observe(observations: Observations, output: StudentOutput, targets_nd: Tensor) -> None:
    observations.target_moments.append(statistics.moments(targets_nd))
    observations.prediction_moments.append(statistics.moments(output.predictions_nd))
    observations.stem_moments.append(statistics.moments(output.features_btd.flatten(0, 1)))
    for name, x_nd in (("target", targets_nd), ("prediction", output.predictions_nd)):
        observations.alignment[f"{name}_rank"] = statistics.effective_rank(x_nd)
        observations.alignment[f"{name}_cosine"] = statistics.mean_cosine(x_nd)


def collapse_statistics(observations: Observations, topology: Topology) -> dict[str, Tensor]:
    """loss, spread of targets, predictions and stem output over all ranks (spec 1.5); tensors, nothing is waited for.

    Effective rank and mean cosine are of this rank's last micro-batch. Collective: all ranks must call.
    """

    def spread(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        count, total_d, square_d = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        packed = torch.cat((count[None], total_d, square_d))
        if topology.data_parallel_size > 1:
            dist.all_reduce(packed, group=topology.data_parallel_group)
        width = total_d.numel()
        return statistics.std_from_moments(packed[0], packed[1 : 1 + width], packed[1 + width :])

    total_loss = observations.loss.clone()
    if topology.data_parallel_size > 1:
        dist.all_reduce(total_loss, group=topology.data_parallel_group)
    return {
        "loss": total_loss,
        "target_std": spread(observations.target_moments),
        "prediction_std": spread(observations.prediction_moments),
        "stem_std": spread(observations.stem_moments),
        **observations.alignment,
    }
