"""What both networks make of samples that are not trained on, under masks that never change: without a single label.

The targets move with the teacher, so the loss of two steps is of two tasks. The share of the targets' variance that the
predictions explain is comparable over a run, and falls to nothing when targets collapse.
"""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.data2vec.comparison import compare
from d2v_scale.data2vec.config import LossConfig
from d2v_scale.data2vec.statistics import lidar
from d2v_scale.data2vec.targets import Made, Target
from d2v_scale.evaluation.config import EvaluationSet
from d2v_scale.evaluation.layer_probe import LayerProbe
from d2v_scale.evaluation.samples import samples_without_labels
from d2v_scale.evaluation.views import VIEWED, VIEWS, ViewProbe
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel.objective import Objective
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.recipe import Recipe
from d2v_scale.teacher.sharded import EmaTeacher

_SAME_NOISE = Draw(0, 0)


class HeldOutSet:
    """Masked batches, which every rank keeps in memory, and what is measured on them."""

    def __init__(
        self,
        batches: Sequence[Batch],
        student: StudentEngine,
        teacher: EmaTeacher,
        config: LossConfig,
        targets: Sequence[Target],
        *,
        trained_on: bool = False,
        redrawn: Sequence[Sequence[Batch]] = (),
    ) -> None:
        """`targets`: those of the batches' stem. All ranks need the same batches. `trained_on`: they are of the
        training set, so that there is no held-out loss to speak of. `redrawn`: the same batches under other masks."""
        assert batches, "no batch to measure"
        self._batches, self._student = batches, student
        self._config, self._targets = config, targets
        self._trained_on = trained_on
        self._layers = LayerProbe(student.module, teacher.module, student.topology)
        # The first ones are enough for LiDAR, and an evaluation takes hardly longer.
        totals = itertools.accumulate(len(batch.inputs) for batch in batches)
        self._viewed = max(1, sum(total <= VIEWED for total in totals))
        self._redrawn = [reading[: self._viewed] for reading in redrawn]
        self._views = ViewProbe(student.module, student.topology)

    @classmethod
    def of(
        cls, recipe: Recipe, stem: str, named: EvaluationSet, student: StudentEngine, teacher: EmaTeacher
    ) -> "HeldOutSet | None":
        """Of a stem's samples, which are decoded once, in the shards that are `named` for it (`named_for`); None where
        there are none. Collective: all ranks must call; all read the same, or raise the same DataError."""
        found = samples_without_labels(recipe, stem, named, recipe.evaluation.max_masked, masked=True, views=VIEWS)
        if found is None:
            return None
        batches = [batch for batch, _ in found.batches]
        loss_config, targets = recipe.objective.of(stem).loss, recipe.built_targets()[stem]
        return cls(batches, student, teacher, loss_config, targets, trained_on=found.trained_on, redrawn=found.redrawn)

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """`held_out_loss` (mean over masked positions), `held_out_explained` (1 - squared error / variance of targets),
        of several targets the weighted sum and the share of the first, and both of each as `.../target_<name>`; `lidar`
        of the student's views (see `evaluation.views`), where there are several of each sample; and on the first batch
        what `LayerProbe.figures` says.

        Each data-parallel rank computes every W-th batch. Collective: all ranks must call; all get the same.
        """
        topology = self._student.topology
        rank = topology.data_parallel_rank
        counted = [index < len(self._batches) for index in self._turns(self._batches)]
        # Of other draws of the same samples only the views are looked at.
        counted += [False for reading in self._redrawn for _ in self._turns(reading)]
        sums = _Sums(self._config, self._targets, counted, topology.device)
        views = []
        for number, reading in enumerate([self._batches, *self._redrawn]):
            turns = self._turns(reading)
            mine = [reading[min(index, len(reading) - 1)].to(topology.device) for index in turns]
            # One rank has the first batch, whatever the world size.
            layers_seen = self._layers.watching(mine[0] if rank == 0 else None) if number == 0 else nullcontext()
            with (
                layers_seen,
                self._views.watching(mine) as found,
                torch.compiler.set_stance("force_eager"),
            ):
                forward_only(mine, self._student, sums)
            # On a stage of a pipeline that has not the last block nothing is found.
            views.append([(k, pooled) for k, pooled in zip(turns, found, strict=False) if k < self._viewed])
        topology.sum_over_model(sums.values)
        layers = self._layers.figures()
        packed = torch.stack([value.double() for value in layers.values()]).tolist()
        held_out = {} if self._trained_on else sums.figures() | self._told_apart(views)
        return held_out | dict(zip(layers, packed, strict=True))

    def _turns(self, batches: Sequence[Batch]) -> range:
        """Numbers of the batches that this rank computes. One that has run out goes on, and repeats the last for
        nothing: a sharded forward needs every rank."""
        rank, size = self._student.topology.data_parallel_rank, self._student.topology.data_parallel_size
        return range(rank, rank + size * -(-len(batches) // size), size)

    def _told_apart(self, views: Sequence[Sequence[tuple[int, Tensor]]]) -> dict[str, float]:
        """`lidar` of all ranks' views; nothing where samples have fewer of them."""
        if self._batches[0].clones * len(views) < VIEWS:
            return {}
        sizes = [len(batch.inputs) for batch in self._batches[: self._viewed]]
        first = [sum(sizes[:number]) for number in range(len(sizes))]
        placed = [[(first[index], pooled_bmd) for index, pooled_bmd in found] for found in views]
        return {"lidar": float(lidar(self._views.together(placed, sum(sizes)).cpu()))}


@torch.no_grad()
def forward_only(batches: list[Batch], student: StudentEngine, objective: Objective) -> None:
    """The student and its teacher on these micro-batches, in eval mode and without gradient, into `objective`.

    The student is left in the mode it was in. Collective: all ranks must call, with equal numbers of micro-batches.
    """
    module = student.module
    was_training = module.training
    module.eval()
    student.forward_batches(batches, _SAME_NOISE, objective)
    module.train(was_training)


class _Sums:
    """An objective that adds up, for every target: positions, loss, squared error, and each channel's sum and sum of
    squares of the targets, in float64 (3 + 2 D,)."""

    reads_states = False

    def __init__(
        self, config: LossConfig, targets: Sequence[Target], counted: list[bool], device: torch.device
    ) -> None:
        """`counted`: which of the micro-batches to come count."""
        self._config, self._targets = config, targets
        self._counted = iter(counted)
        self._sizes = [3 + 2 * target.width for target in targets]
        self.values = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)

    def entered(self, batch: Batch, features_btd: Tensor) -> None:
        """Not looked at."""

    def share(
        self,
        batch: Batch,
        predictions: Sequence[Tensor],
        cls: Sequence[Tensor | None],
        made: Sequence[Made],
        means: Sequence[Tensor] = (),
    ) -> Tensor:
        """Add a micro-batch; gives 0, as nothing is trained."""
        del cls, means
        if next(self._counted):
            found = []
            for one in compare(batch, self._targets, predictions, made):
                whole = one._replace(predictions_nd=one.predictions_nd.double(), targets_nd=one.targets_nd.double())
                targets_nd = whole.targets_nd
                scalars = (
                    torch.tensor(float(len(targets_nd)), dtype=torch.float64, device=targets_nd.device),
                    whole.loss_sum(self._config).double(),
                    (whole.predictions_nd - targets_nd).square().sum(),
                )
                found += [torch.stack(scalars), targets_nd.sum(0), targets_nd.square().sum(0)]
            self.values += torch.cat(found)
        return torch.zeros((), device=self.values.device)

    def figures(self) -> dict[str, float]:
        """Of all that was added, on any rank."""
        each = {}
        for target, values in zip(self._targets, self.values.split(self._sizes), strict=True):
            count, total, error = values[:3].tolist()
            sum_d, square_d = values[3:].chunk(2)
            variance = float((square_d - sum_d.square() / max(1.0, count)).sum())
            each[target.config.called] = total / max(1.0, count), 1 - error / max(variance, 1e-12)
        weighted = sum(target.config.weight * each[target.config.called][0] for target in self._targets)
        figures = {"held_out_loss": weighted, "held_out_explained": each[self._targets[0].config.called][1]}
        if len(each) > 1:
            for name, (loss, explained) in each.items():
                figures |= {f"held_out_loss/target_{name}": loss, f"held_out_explained/target_{name}": explained}
        return figures
