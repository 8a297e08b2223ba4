"""One optimizer step: student forward, teacher forward, loss, backward, verdict, teacher update."""

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.batch import Batch, masked_targets
from d2v_scale.data2vec import ema, loss, statistics
from d2v_scale.data2vec.comparison import compare
from d2v_scale.data2vec.config import LossConfig, ObjectiveConfig
from d2v_scale.data2vec.koleo import koleo_sum
from d2v_scale.data2vec.targets import Made, State, Target
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.layered import by_part
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StepResult, StudentEngine
from d2v_scale.pretraining.breakdown import LossBreakdown
from d2v_scale.process.profiling import part
from d2v_scale.teacher import target_state
from d2v_scale.teacher.sharded import EmaTeacher
from d2v_scale.tracking.meters import Stopwatch

TARGETS, PREDICTIONS, STEM = range(3)
"""Rows of a source's part of `Observations.moments`."""
_PER_SOURCE = 3
_SPREADS = ("target_std", "prediction_std", "stem_std")
_LOOKS = ("target_rank", "target_cosine", "prediction_rank", "prediction_cosine")
OF_A_STEP = ("stem_std", *_LOOKS)
"""Figures of a logged step that are recorded as `<figure>/<source>`, too, where there are several."""


@dataclass
class Observations:
    """What the step leaves for the log, on the device and summed over this rank's micro-batches; read when logging.

    In a pipeline each stage fills in what it sees, and what others see stays zero.
    """

    loss: Tensor
    """This rank's share of the step's loss: the sum over ranks is the loss."""
    samples: Tensor
    """Samples of the whole step."""
    predicted: Tensor
    """float64 (S,): positions of the whole step that are predicted, by source."""
    moments: list[Tensor]
    """Of each source raw targets, predictions and stem output, each with its channels D: float64 (1 + 2D,), count, sum
    and sum of squares."""
    alignment: dict[int, Tensor]
    """By source, if this rank has a micro-batch that tells them: float32 (4,), effective rank and mean cosine of its
    last targets, and of its last predictions."""
    sources: tuple[str, ...]
    """Their names."""
    ema_time: Stopwatch = field(default_factory=Stopwatch)

    @classmethod
    def empty(
        cls,
        samples: Tensor,
        predicted: Tensor,
        widths: Sequence[tuple[int, int, int]],
        aligned: Collection[int],
        sources: Iterable[str],
        device: torch.device,
    ) -> "Observations":
        """Nothing seen yet. `widths`: of each, of raw targets, predictions and stem output; `aligned`: those
        of which there will be an alignment."""
        zero = torch.zeros((), dtype=torch.float64, device=device)
        moments = [torch.zeros(1 + 2 * width, dtype=torch.float64, device=device) for each in widths for width in each]
        alignment = {source: torch.zeros(len(_LOOKS), device=device) for source in aligned}
        return cls(zero, samples, predicted, moments, alignment, tuple(sources))

    def count(self, source: int, what: int, x_nd: Tensor) -> None:
        """Add the moments of these vectors (N, D) of a source."""
        count, total_d, square_d = statistics.moments(x_nd)
        self.moments[_PER_SOURCE * source + what] += torch.cat((count[None], total_d, square_d))

    def look(self, source: int, targets_nd: Tensor, predictions_nd: Tensor) -> None:
        """See how the vectors (N, D) of a source lie to each other."""
        looks = (statistics.effective_rank, statistics.mean_cosine)
        found = [look(x_nd) for x_nd in (targets_nd, predictions_nd) for look in looks]
        self.alignment[source] = torch.stack(found).float()


def count_step(batches: list[Batch], topology: Topology) -> Tensor:
    """Predicted positions, rows and samples of the whole step by source, in the order of their first micro-batches:
    float64 (S, 3) on the device, without waiting for it. Every part of paired samples is a source, and the first one
    has their samples.

    The masks of every micro-batch are drawn before the first forward, so that each can be divided by what all ranks
    will mask of its source. One all-reduce. Collective over the data-parallel group: all its ranks must call, with
    micro-batches of the same sources.
    """
    counts: dict[str, list[int]] = {}
    for batch in batches:
        for number, of_stem in enumerate(batch.of_stems):
            own = counts.setdefault(of_stem.source, [0, 0, 0])
            own[0] += of_stem.layout.predictions
            own[1] += 0 if batch.is_blank else (len(of_stem.inputs) - of_stem.absent) * of_stem.clones
            own[2] += 0 if batch.is_blank or number else len(batch.inputs)
    found = torch.tensor(list(counts.values()), dtype=torch.float64).to(topology.device, non_blocking=True)
    topology.sum_over_replicas(found)
    return found


class StepLoss:
    """The objective of one step: what every micro-batch adds to it, and what is observed on the way.

    The loss is a sum over sources; of each it is the sum over masked positions divided by their number over all ranks
    and micro-batches (spec 1.3), times the source's weight. So every micro-batch's sum is scaled by data-parallel size
    x accumulation / count: DeepSpeed divides by both. Every part of paired samples counts as a source by itself.
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        batches: list[Batch],
        topology: Topology,
        width: int,
        targets: Mapping[str, Sequence[Target]],
        states: Mapping[str, Sequence[State]],
        weights: Mapping[str, float],
        breakdown: LossBreakdown | None,
        *,
        observe: bool,
    ) -> None:
        """`width`: channels of the stem's output; `targets`: by stem; `states`: likewise one a target, {} where it has
        none, and no stem where targets are made elsewhere; `weights`: by source, where it is not 1; of paired samples
        of all their parts. Collective over the data-parallel group: all its ranks must call."""
        stems = {one.source: one.modality for batch in batches for one in batch.of_stems}
        self._number = {source: number for number, source in enumerate(stems)}
        self._configs = {stem: objective.of(stem).loss for stem in stems.values()}
        self._targets, self._weights = targets, weights
        self.reads_states = any(config.koleo_weight > 0 for config in self._configs.values())
        self._states = {stem: states.get(stem) or [{} for _ in targets[stem]] for stem in stems.values()}
        self.statistics: dict[str, list[dict[str, Tensor]]] = {s: [{} for _ in targets[s]] for s in stems.values()}
        """What the micro-batches say about the state of each of a stem's targets, added up."""
        counted = count_step(batches, topology)
        self._counts = counted.clamp(min=1)
        self._factor = topology.data_parallel_size * len(batches)
        self._breakdown = breakdown
        self._observe = observe
        # The first target stands for all: their raw values come from the same teacher.
        first = [targets[stem][0] for stem in stems.values()]
        widths = [(target.raw_width, target.width, width) for target in first]
        seen = [one for batch in batches for one in batch.of_stems]
        aligned = sorted({self._number[one.source] for one in seen if _tells(one)})
        samples = counted[:, 2].sum() if len(stems) > 1 else counted[0, 2]
        self.seen = Observations.empty(samples, counted[:, 0], widths, aligned, stems, topology.device)

    def entered(self, batch: Batch, features_btd: Tensor) -> None:
        """The stems have made these features of a micro-batch."""
        if self._observe and not batch.is_blank:
            for one, x_btd in zip(batch.of_stems, by_part(batch, features_btd), strict=True):
                self.seen.count(self._number[one.source], STEM, x_btd.flatten(0, 1))

    def share(
        self,
        batch: Batch,
        predictions: Sequence[Tensor],
        cls: Sequence[Tensor | None],
        made: Sequence[Made],
        means: Sequence[Tensor] = (),
    ) -> Tensor:
        """What a micro-batch adds to the loss, scaled for DeepSpeed's division. Of every target its predictions, and
        what was made; of every stem the output at its last extra token, and its mean state if one is read."""
        weight, coming = self._weights.get(batch.source, 1.0), zip(predictions, made, strict=True)
        shares = []
        states: Sequence[Tensor | None] = means or [None] * len(cls)
        for of_stem, cls_rd, mean_rd in zip(batch.of_stems, cls, states, strict=True):
            own = list(itertools.islice(coming, len(self._targets[of_stem.modality])))
            made_of_stem = [one for _, one in own]
            shares.append(self._share_of(of_stem, [x for x, _ in own], (cls_rd, mean_rd), made_of_stem, weight))
        return sum(shares[1:], shares[0]) * self._factor

    def _share_of(
        self,
        batch: Batch,
        predictions: Sequence[Tensor],
        of_rows: tuple[Tensor | None, Tensor | None],
        made: Sequence[Made],
        weight: float,
    ) -> Tensor:
        """What one stem's part of a micro-batch adds to the loss, not scaled. `of_rows`: output at its last extra
        token, and mean state; `weight`: of its source."""
        cls_rd, mean_rd = of_rows
        stem, number = batch.modality, self._number[batch.source]
        config, counts = self._configs[stem], self._counts[number]
        self._ask(stem, made)
        compared = compare(batch, self._targets[stem], predictions, made)
        targets_btd = made[0].targets_btd
        total = weighted_sum(compared, config)
        share = total / counts[0].float()
        # A stem may have no extra token.
        if config.cls_weight > 0 and cls_rd is not None:
            # Of a blank row it is part of the graph, as on every rank, and counts nothing.
            first = 0.0 if batch.is_blank else compared[0].weight
            real = (batch.real_bt, batch.present_b)
            total = first * loss.cls_loss_sum(cls_rd, targets_btd, config, targets_btd.shape[-1], *real)
            share = share + total / counts[1].float()
        if config.koleo_weight > 0 and mean_rd is not None:
            total = koleo_sum(mean_rd, batch.clones, config.koleo_group, batch.present_b)
            share = share + (0.0 if batch.is_blank else config.koleo_weight) * total / counts[1].float()
        for factor in (config.weight, weight):
            share = share * factor if factor != 1 else share
        self.seen.loss += share.detach()
        if not self._observe and self._breakdown is None:
            return share
        raw = [
            pair.targets_nd if one.raw_btd is one.targets_btd else masked_targets(one.raw_btd, batch)
            for pair, one in zip(compared, made, strict=True)
        ]
        if self._observe:
            raw_nd = raw[0]
            predictions_nd = compared[0].predictions_nd
            self.seen.count(number, TARGETS, raw_nd)
            self.seen.count(number, PREDICTIONS, predictions_nd)
            if _tells(batch):
                self.seen.look(number, raw_nd, predictions_nd)
        if self._breakdown is not None:
            self._breakdown.add(batch, compared, raw, config)
        return share

    @torch.no_grad()
    def _ask(self, stem: str, made: Sequence[Made]) -> None:
        """Add what a micro-batch says about the states of its stem's targets."""
        found = self.statistics[stem]
        for number, (target, state, one) in enumerate(zip(self._targets[stem], self._states[stem], made, strict=True)):
            if state:
                assert one.counted_bt is not None
                said, before = target.statistics(one.raw_btd, one.counted_bt, state), found[number]
                found[number] = {name: x.double() + before.get(name, 0.0) for name, x in said.items()}


def _tells(batch: Batch) -> bool:
    """Whether the batch predicts enough to see how vectors lie to each other."""
    return batch.layout.predictions > 1


def train_step(
    student: StudentEngine,
    teacher: EmaTeacher,
    batches: list[Batch],
    objective: ObjectiveConfig,
    draw: Draw,
    *,
    observe: bool,
    weights: Mapping[str, float] | None = None,
    breakdown: LossBreakdown | None = None,
) -> tuple[StepResult, Observations]:
    """Run one step over this rank's micro-batches. Collective: all ranks must call, with micro-batches of the same
    sources in the same order.

    `observe` also collects what `collapse_statistics` needs. `weights`: factors on the sources' parts of the loss,
    where they are not 1. `breakdown` gets the loss by source. The teacher and the state of its targets move if and only
    if the optimizer stepped.
    """
    width = cast(Student, student.module).config.backbone.width
    targets = cast(Teacher, teacher.module).targets
    states = target_state.of(teacher)
    step_loss = StepLoss(
        objective, batches, student.topology, width, targets, states, weights or {}, breakdown, observe=observe
    )
    student.add_loss_in(step_loss.seen.loss)
    result = student.train_batches(batches, draw, step_loss, measure=observe)
    if result.applied:
        if observe:
            teacher.measure()
        with part("ema"), step_loss.seen.ema_time:
            teacher.update(ema.decay(objective.ema, student.completed_updates))
        target_state.move(teacher, step_loss.statistics)
    return result, step_loss.seen


def weighted_sum(compared: Sequence[loss.Compared], config: LossConfig) -> Tensor:
    """Sum over masked positions of the loss, each target's by its weight; an fp32 scalar."""
    parts = [one.loss_sum(config) * one.weight if one.weight != 1 else one.loss_sum(config) for one in compared]
    return sum(parts[1:], parts[0])


def collapse_statistics(
    observations: Observations, topology: Topology, told_apart: Collection[str] = ()
) -> dict[str, Tensor]:
    """loss, spread of targets, predictions and stem output over all ranks (spec 1.5), of several sources the mean of
    their spreads; tensors, nothing is waited for. `read` says which of them were there to be measured.

    Effective rank and mean cosine are of one rank's last micro-batch that predicts something (of each source), and
    missing where there is none. Of sources that are `told_apart`, each has `OF_A_STEP` by itself, too, as
    FIGURE/SOURCE. Collective: all ranks must call.
    """
    sums = torch.cat((observations.loss[None], *observations.moments))
    topology.sum_over_model(sums)
    rows = sums[1:].split([one.numel() for one in observations.moments])
    found = {"loss": sums[0]}
    for what, name in enumerate(_SPREADS):
        found[name] = _mean_spread(rows[what::_PER_SOURCE], observations.predicted)
    looks_sf = torch.stack([*observations.alignment.values()]) if observations.alignment else None
    if looks_sf is not None:
        if topology.pipeline_size > 1:
            dist.all_reduce(looks_sf, group=topology.pipeline_group)
        found |= zip(_LOOKS, looks_sf.mean(0), strict=True)
    aligned = list(observations.alignment)
    for number, source in enumerate(observations.sources):
        if source not in told_apart:
            continue
        found[f"stem_std/{source}"] = _mean_spread(rows[_PER_SOURCE * number + STEM :][:1], observations.predicted)
        if looks_sf is not None and number in aligned:
            own_f = looks_sf[aligned.index(number)]
            found |= {f"{name}/{source}": value for name, value in zip(_LOOKS, own_f, strict=True)}
    return found


def _mean_spread(rows: Sequence[Tensor], predicted_s: Tensor) -> Tensor:
    """Mean over the sources that predict something of the spread that these moments tell."""
    found = []
    for row in rows:
        width = (row.numel() - 1) // 2
        found.append(statistics.std_from_moments(row[0], row[1 : 1 + width], row[1 + width :]))
    if len(found) == 1:
        return found[0]
    there_s = (predicted_s > 1).double()
    return torch.where(there_s > 0, torch.stack(found), 0.0).sum() / there_s.sum().clamp(min=1)


def read(figures: Mapping[str, Tensor], observations: Observations) -> dict[str, float]:
    """The values of figures of a step, without those of `collapse_statistics` that nothing was there to be measured
    for, since all samples were lost. Waits for the device."""
    device = observations.predicted.device
    packed = torch.cat((observations.predicted, torch.stack([x.to(device, torch.float64) for x in figures.values()])))
    sources, read_out = len(observations.predicted), packed.tolist()
    predicted, values = read_out[:sources], read_out[sources:]
    # One vector has no spread.
    missing = ["loss"] * (max(predicted) == 0) + [*_SPREADS] * (max(predicted) <= 1)
    lost = [source for source, count in zip(observations.sources, predicted, strict=True) if count <= 1]
    missing += [f"{name}/{source}" for source in lost for name in OF_A_STEP]
    return {name: value for name, value in zip(figures, values, strict=True) if name not in missing}
