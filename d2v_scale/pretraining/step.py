"""One optimizer step: student forward, teacher forward, loss, backward, verdict, teacher update."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.batch import Batch, masked_targets
from d2v_scale.data2vec import ema, loss, statistics
from d2v_scale.data2vec.comparison import compare
from d2v_scale.data2vec.config import LossConfig, ObjectiveConfig
from d2v_scale.data2vec.targets import Made, State, Target
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StepResult, StudentEngine
from d2v_scale.pretraining.breakdown import LossBreakdown
from d2v_scale.process.profiling import part
from d2v_scale.teacher import target_state
from d2v_scale.teacher.sharded import EmaTeacher
from d2v_scale.tracking.meters import Stopwatch

TARGETS, PREDICTIONS, STEM = range(3)
"""Rows of `Observations.moments`."""


@dataclass
class Observations:
    """What the step leaves for the log, on the device and summed over this rank's micro-batches; read when logging.

    In a pipeline each stage fills in what it sees, and what others see stays zero.
    """

    loss: Tensor
    """This rank's share of the step's loss: the sum over ranks is the loss."""
    samples: Tensor
    """Samples of the whole step."""
    moments: list[Tensor]
    """Of raw targets, predictions and stem output, each with its channels D: float64 (1 + 2D,), count, sum and sum of
    squares."""
    alignment: Tensor
    """float32 (4,): effective rank and mean cosine of this rank's last targets, and of its last predictions."""
    ema_time: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def empty(cls, samples: Tensor, widths: tuple[int, int, int], device: torch.device) -> "Observations":
        """Nothing seen yet. `widths`: of raw targets, predictions and stem output."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        moments = [torch.zeros(1 + 2 * width, dtype=torch.float64, device=device) for width in widths]
        return cls(zero, samples, moments, torch.zeros(4, device=device))

    def count(self, what: int, x_nd: Tensor) -> None:
        """Add the moments of these vectors (N, D)."""
        count, total_d, square_d = statistics.moments(x_nd)
        self.moments[what] += torch.cat((count[None], total_d, square_d))


def count_step(batches: list[Batch], topology: Topology) -> Tensor:
    """Predicted positions and rows of the whole step: float64 (2,) on the device, without waiting for it.

    The masks of every micro-batch are drawn before the first forward, so that each can be divided by what all ranks
    will mask. Collective over the data-parallel group: all its ranks must call.
    """
    masked = sum(batch.layout.predictions for batch in batches)
    rows = sum(batch.masked_rt.shape[0] for batch in batches if not batch.is_blank)
    counts = torch.tensor([masked, rows], dtype=torch.float64).to(topology.device, non_blocking=True)
    topology.sum_over_replicas(counts)
    return counts.clamp(min=1)


class StepLoss:
    """The objective of one step: what every micro-batch adds to it, and what is observed on the way.

    The loss is a sum over masked positions divided by their number over all ranks and micro-batches (spec 1.3), so
    every micro-batch's sum is scaled by data-parallel size x accumulation / count: DeepSpeed divides by both.
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        batches: list[Batch],
        topology: Topology,
        width: int,
        targets: Sequence[Target],
        states: Sequence[State],
        breakdown: LossBreakdown | None,
        *,
        observe: bool,
    ) -> None:
        """`width`: channels of the stem's output; `states`: one a target, {} where it has none or targets are made
        elsewhere. Collective over the data-parallel group: all its ranks must call."""
        self._config = objective.loss
        self._targets, self._states = targets, states
        self.statistics: list[dict[str, Tensor]] = [{} for _ in targets]
        """What the micro-batches say about each target's state, added up."""
        self._counts = count_step(batches, topology)
        self._factor = topology.data_parallel_size * len(batches)
        self._breakdown = breakdown
        self._observe = observe
        # The first target stands for all: their raw values come from the same teacher.
        widths = (targets[0].raw_width, targets[0].width, width)
        self.seen = Observations.empty(self._counts[1] / objective.masking.clones, widths, topology.device)

    def entered(self, features_btd: Tensor) -> None:
        """The stem has made these features of a micro-batch."""
        if self._observe:
            self.seen.count(STEM, features_btd.flatten(0, 1))

    def share(self, batch: Batch, predictions: Sequence[Tensor], cls_rd: Tensor | None, made: Sequence[Made]) -> Tensor:
        """What a micro-batch adds to the loss, scaled for DeepSpeed's division. Of every target its predictions, and
        what was made."""
        self._ask(made)
        compared = compare(batch, self._targets, predictions, made)
        targets_btd, targets_nd = made[0].targets_btd, compared[0].targets_nd
        total = weighted_sum(compared, self._config)
        share = total / self._counts[0].float()
        # A stem may have no extra token; a step is of one stem, on all ranks.
        if self._config.cls_weight > 0 and cls_rd is not None:
            # Of a blank row it is part of the graph, as on every rank, and counts nothing.
            weight = 0.0 if batch.is_blank else compared[0].weight
            total = weight * loss.cls_loss_sum(cls_rd, targets_btd, self._config, targets_btd.shape[-1], batch.real_bt)
            share = share + total / self._counts[1].float()
        share = share * self._config.weight if self._config.weight != 1 else share
        self.seen.loss += share.detach()
        if not self._observe and self._breakdown is None:
            return share * self._factor
        raw_nd = targets_nd if made[0].raw_btd is targets_btd else masked_targets(made[0].raw_btd, batch)
        if self._observe:
            predictions_nd = compared[0].predictions_nd
            self.seen.count(TARGETS, raw_nd)
            self.seen.count(PREDICTIONS, predictions_nd)
            looks = (statistics.effective_rank, statistics.mean_cosine)
            found = [look(x_nd) for x_nd in (raw_nd, predictions_nd) for look in looks]
            self.seen.alignment = torch.stack(found).float()
        if self._breakdown is not None:
            self._breakdown.add(batch, compared, raw_nd, self._config)
        return share * self._factor

    @torch.no_grad()
    def _ask(self, made: Sequence[Made]) -> None:
        """Add what a micro-batch says about the targets' states."""
        for number, (target, state, one) in enumerate(zip(self._targets, self._states, made, strict=True)):
            if state:
                assert one.counted_bt is not None
                said, before = target.statistics(one.raw_btd, one.counted_bt, state), self.statistics[number]
                self.statistics[number] = {name: x.double() + before.get(name, 0.0) for name, x in said.items()}


def train_step(
    student: StudentEngine,
    teacher: EmaTeacher,
    batches: list[Batch],
    objective: ObjectiveConfig,
    draw: Draw,
    *,
    observe: bool,
    breakdown: LossBreakdown | None = None,
) -> tuple[StepResult, Observations]:
    """Run one step over this rank's micro-batches. Collective: all ranks must call, with the same modality.

    `observe` also collects what `collapse_statistics` needs. `breakdown` gets the loss by source. The teacher and the
    state of its targets move if and only if the optimizer stepped.
    """
    width = cast(Student, student.module).config.backbone.width
    stem = batches[0].modality
    targets = cast(Teacher, teacher.module).targets[stem]
    states = target_state.of(teacher).get(stem) or [{} for _ in targets]
    step_loss = StepLoss(
        objective.of(stem), batches, student.topology, width, targets, states, breakdown, observe=observe
    )
    result = student.train_batches(batches, draw, step_loss, measure=observe)
    if result.applied:
        if observe:
            teacher.measure()
        with part("ema"), step_loss.seen.ema_time:
            teacher.update(ema.decay(objective.ema, student.completed_updates))
        if any(step_loss.statistics):
            target_state.move(teacher, stem, step_loss.statistics)
    return result, step_loss.seen


def weighted_sum(compared: Sequence[loss.Compared], config: LossConfig) -> Tensor:
    """Sum over masked positions of the loss, each target's by its weight; an fp32 scalar."""
    parts = [one.loss_sum(config) * one.weight if one.weight != 1 else one.loss_sum(config) for one in compared]
    return sum(parts[1:], parts[0])


def collapse_statistics(observations: Observations, topology: Topology) -> dict[str, Tensor]:
    """loss, spread of targets, predictions and stem output over all ranks (spec 1.5); tensors, nothing is waited for.

    Effective rank and mean cosine are of one rank's last micro-batch. Collective: all ranks must call.
    """
    sums = torch.cat((observations.loss[None], *observations.moments))
    topology.sum_over_model(sums)
    alignment = observations.alignment.clone()
    if topology.pipeline_size > 1:
        dist.all_reduce(alignment, group=topology.pipeline_group)

    rows = sums[1:].split([one.numel() for one in observations.moments])

    def spread(what: int) -> Tensor:
        row = rows[what]
        width = (row.numel() - 1) // 2
        return statistics.std_from_moments(row[0], row[1 : 1 + width], row[1 + width :])

    return {
        "loss": sums[0],
        "target_std": spread(TARGETS),
        "prediction_std": spread(PREDICTIONS),
        "stem_std": spread(STEM),
        "target_rank": alignment[0],
        "target_cosine": alignment[1],
        "prediction_rank": alignment[2],
        "prediction_cosine": alignment[3],
    }
