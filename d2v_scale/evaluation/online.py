"""k-NN accuracy of the teacher while it trains."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.data.batch import Batch
from d2v_scale.evaluation.config import EvaluationConfig
from d2v_scale.evaluation.features import mean_over_positions
from d2v_scale.evaluation.knn import knn, whitened
from d2v_scale.model.stack import Student, Teacher
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.teacher import ShardedTeacher

LabelledBatches = Sequence[tuple[Batch, Tensor]]


class OnlineEvaluation:
    """k-NN on two small labelled sets, which every rank keeps in memory."""

    def __init__(
        self,
        config: EvaluationConfig,
        train: LabelledBatches,
        test: LabelledBatches,
        student: StudentEngine,
        teacher: ShardedTeacher,
    ) -> None:
        self.config = config
        self._train, self._test = train, test
        self._student, self._teacher = student, teacher

    def accuracy(self) -> float:
        """k-NN accuracy in [0, 1] of the teacher's features, whitened. Collective: all ranks must call; all get it."""
        features_nd, labels_n = self._features(self._train)
        queries_qd, labels_q = self._features(self._test)
        features_nd, queries_qd = whitened(features_nd, queries_qd)
        return knn(features_nd, labels_n, queries_qd, labels_q, self.config.k)

    def _features(self, batches: LabelledBatches) -> tuple[Tensor, Tensor]:
        """Features (N, D) and labels (N,) of all batches; each data-parallel rank computes every W-th batch."""
        topology = self._student.topology
        rank, size = topology.data_parallel_rank, topology.data_parallel_size
        # A rank that has run out repeats its last batch: a sharded forward needs every rank.
        rounds = -(-len(batches) // size)
        mine: list[tuple[int, Tensor]] = []
        for turn in range(rounds):
            index = min(turn * size + rank, len(batches) - 1)
            mine.append((index, self._pooled(batches[index][0])))
        everyone: list[list[tuple[int, Tensor]]] = [mine]
        if size > 1:
            everyone = [[] for _ in range(size)]
            dist.all_gather_object(everyone, mine, group=topology.data_parallel_group)
        found = dict(pair for part in everyone for pair in part)
        labels = [labels_b for _, labels_b in batches]
        return torch.cat([found[index] for index in range(len(batches))]), torch.cat(labels)

    @torch.no_grad()
    def _pooled(self, batch: Batch) -> Tensor:
        """(B, D) on the CPU: mean over positions of each chosen layer, standardised, then the mean over layers."""
        module, teacher = cast(Student, self._student.module), cast(Teacher, self._teacher.module)
        batch = batch.to(self._student.topology.device)
        shared = None
        if not teacher.owns_features(batch.modality):
            was_training = module.training
            module.eval()
            shared = module.stem_features(batch)
            module.train(was_training)
        depth = teacher.config.backbone.depth
        layers = [layer for layer in self.config.layers if -depth <= layer < depth]
        valid_bt = teacher.valid_positions(batch)
        pooled = [mean_over_positions(x_btd, valid_bt) for x_btd in self._teacher.features(batch, shared, layers)]
        return torch.stack([F.layer_norm(x_bd, x_bd.shape[-1:]) for x_bd in pooled]).mean(0).cpu()
