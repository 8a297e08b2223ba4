"""What the teacher's representations of one stem's samples are worth while it trains: k-NN accuracy, and pictures."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data2vec import likeness
from d2v_scale.data2vec.statistics import rankme
from d2v_scale.evaluation.config import EvaluationConfig, EvaluationSet
from d2v_scale.evaluation.features import mean_over_layers
from d2v_scale.evaluation.knn import whitened_knn
from d2v_scale.evaluation.raw import hashed
from d2v_scale.evaluation.samples import require_same, samples_without_labels
from d2v_scale.model.pooling import mean_over_positions
from d2v_scale.networks.layered import Layered
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.plots.gallery import FIRST, Gallery
from d2v_scale.recipe import Recipe
from d2v_scale.shards.class_names import agreed_classes
from d2v_scale.teacher.sharded import EmaTeacher

LabelledBatches = Sequence[tuple[Batch, Tensor]]
_PICTURED = 256
"""Samples among which neighbours are looked for in pictures, at most,"""
_PICTURED_BYTES = 128 * 2**20
"""and how large they may be."""
_PICTURED_AT_ONCE = 8
"""Samples of which all blocks' outputs are held at the same time."""


@dataclass(frozen=True)
class LabelNames:
    """How labels and tokens of samples are shown."""

    classes: list[str]
    tokenizer: str | None

    def of(self, label: int) -> str:
        """A class's name, or its number where it has none; nothing for -1, which is no label."""
        return "" if label < 0 else self.classes[label] if label < len(self.classes) else str(label)


class OnlineEvaluation:
    """k-NN on two small labelled sets, which every rank keeps in memory, and pictures of the second.

    Without labelled sets only pictures, of samples without labels.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        train: LabelledBatches,
        test: LabelledBatches,
        student: StudentEngine,
        teacher: EmaTeacher,
        names: LabelNames,
        *,
        trained_on: bool = False,
    ) -> None:
        """`train`: empty where there is no k-NN. `trained_on`: `test` is of the training set, and only drawn."""
        self.config = config
        self._names, self._trained_on = names, trained_on
        self._train, self._test = train, test
        self._student, self._teacher = student, teacher
        self._raw: float | None = None

    @classmethod
    def of(
        cls, recipe: Recipe, stem: str, named: EvaluationSet, student: StudentEngine, teacher: EmaTeacher
    ) -> "OnlineEvaluation | None":
        """On the labelled shards that are `named` for a stem (`named_for`), which are decoded once. Where there are
        none there are only pictures of other samples; None where there is nothing to draw. Collective: all ranks must
        call; all read the same, or raise the same DataError."""
        config = recipe.evaluation
        if named.train is None or named.test is None:
            samples = samples_without_labels(recipe, stem, named, _PICTURED, masked=False)
            if samples is None:
                return None
            unnamed = LabelNames([], samples.tokenizer)
            return cls(config, [], samples.batches, student, teacher, unnamed, trained_on=samples.trained_on)

        def labelled(shards: str, limit: int) -> LabelledSet:
            return LabelledSet(shards, stem, recipe.data, recipe.model, batch_size=config.batch_size, limit=limit)

        train, test = labelled(named.train, config.max_train), labelled(named.test, config.max_test)
        classes = agreed_classes([(named.train, train.classes), (named.test, test.classes)])
        names = LabelNames(classes, str(test.tokenizer) if test.tokenizer else None)
        read_train, read_test = train.read(), test.read()
        require_same([*read_train, *read_test], f"{named.train} and {named.test}")
        return cls(config, read_train, read_test, student, teacher, names)

    def figures(self) -> dict[str, float]:
        """All figures for the record. Collective: all ranks must call; all get the same.

        `knn_accuracy`, in [0, 1], of the teacher's features (of the student's where no teacher follows it), whitened;
        `knn_samples`, of how many; and what it has to be above: `knn_chance`, the share of the commonest label, which
        is found without looking at a sample, and `knn_raw`, the accuracy of `raw_features`. `layer_likeness`: CKA,
        debiased (about 0: nothing in common, 1: the same), of the first and last main block on the samples' means over
        positions. `rankme`, without labels, too, of the features that k-NN looks at, before they are whitened.
        """
        if self._trained_on:
            return {}
        test_qld = self._of_all(self._test, self._pooled)
        test_qd = mean_over_layers(test_qld[:, :-2].transpose(0, 1))
        figures = {"rankme": float(rankme(test_qd))}
        if not self._train:
            return figures
        labels_q = torch.cat([labels_b for _, labels_b in self._test])
        chance = int(labels_q.unique(return_counts=True)[1].max()) / len(labels_q)
        if self._raw is None:
            self._raw = self._accuracy(*(self._of_all(batches, self._without_model) for batches in self._sets))
        train_nld = self._of_all(self._train, self._pooled)
        figures |= {
            "knn_accuracy": self._accuracy(mean_over_layers(train_nld[:, :-2].transpose(0, 1)), test_qd),
            "knn_samples": len(labels_q),
            "knn_chance": chance,
            "knn_raw": self._raw,
        }
        if self._depth > 1 and len(labels_q) >= likeness.LEAST:
            first_qd, last_qd = test_qld[:, -2], test_qld[:, -1]
            figures["layer_likeness"] = float(likeness.debiased_cka(first_qd, last_qd).mean())
        return figures

    @property
    def _sets(self) -> tuple[LabelledBatches, LabelledBatches]:
        return self._train, self._test

    def _accuracy(self, features_nd: Tensor, queries_qd: Tensor) -> float:
        """Of k-NN in [0, 1], from both sets' features before they are whitened."""
        labels_n, labels_q = (torch.cat([labels_b for _, labels_b in batches]) for batches in self._sets)
        return whitened_knn(features_nd, labels_n, queries_qd, labels_q, self.config.k)

    def _of_all(self, batches: LabelledBatches, features: Callable[[Batch], Tensor]) -> Tensor:
        """(N, ...): `features` (B, ...), on the CPU, of all batches; each data-parallel rank computes every W-th."""
        topology = self._student.topology
        rank, size = topology.data_parallel_rank, topology.data_parallel_size
        # A rank that has run out repeats its last batch: a sharded forward needs every rank.
        rounds = -(-len(batches) // size)
        mine: list[tuple[int, Tensor]] = []
        for turn in range(rounds):
            index = min(turn * size + rank, len(batches) - 1)
            mine.append((index, features(batches[index][0])))
        everyone: list[list[tuple[int, Tensor]]] = [mine]
        if size > 1:
            everyone = [[] for _ in range(size)]
            dist.all_gather_object(everyone, mine, group=topology.data_parallel_group)
        found = dict(pair for part in everyone for pair in part)
        return torch.cat([found[index] for index in range(len(batches))])

    def _without_model(self, batch: Batch) -> Tensor:
        """(B, F): raw features, of a width that can be whitened."""
        config = cast(Layered, self._teacher.encoder).config
        return hashed(modalities.of(config, batch.modality).raw_features(batch).float())

    def _pooled(self, batch: Batch) -> Tensor:
        """(B, L + 2, D): mean over positions of each chosen layer, of the first and of the last."""
        depth = self._depth
        chosen = [layer for layer in self.config.layers if -depth <= layer < depth]
        pooled_lbd, _ = self._states(batch, [*chosen, 0, depth - 1])
        return pooled_lbd.transpose(0, 1).cpu()

    def gallery(self, recipe: Recipe, step: int) -> Gallery:
        """What pictures of the first samples are drawn from. Collective: all ranks must call."""
        batch, labels_b = first_batches(self._test, _PICTURED, _PICTURED_BYTES)
        everything = list(range(self._depth))
        parts = [rows(batch, start, start + _PICTURED_AT_ONCE) for start in range(0, len(labels_b), _PICTURED_AT_ONCE)]
        found = []
        for index, part in enumerate(parts):
            pooled_lbd, last_btd = self._states(part, everything)
            # Of the later ones only the means are drawn.
            found.append(
                (pooled_lbd.cpu(), last_btd.float().cpu() if index * _PICTURED_AT_ONCE < FIRST else last_btd[:0])
            )
        valid_bt = cast(Layered, self._teacher.encoder).valid_positions(batch)
        return Gallery(
            batch=batch,
            kind=recipe.model.kind(batch.modality),
            labels=[self._names.of(label) for label in labels_b.tolist()],
            valid_bt=valid_bt,
            teacher_lnd=torch.cat([pooled for pooled, _ in found], dim=1),
            first_btd=torch.cat([last for _, last in found[: FIRST // _PICTURED_AT_ONCE]]),
            masks=recipe.masking_of(batch.modality),
            equal_counts=recipe.model.visible_only,
            seed=recipe.seed,
            step=step,
            tokenizer=self._names.tokenizer,
            encoder="teacher" if self._teacher.follows else "student",
            suffix=f"_{batch.modality}" if len(recipe.model.modalities) > 1 else "",
        )

    @property
    def _depth(self) -> int:
        return cast(Layered, self._teacher.encoder).config.backbone.depth

    @torch.no_grad()
    def _states(self, batch: Batch, layers: list[int]) -> tuple[Tensor, Tensor]:
        """Of these blocks: the outputs' means over positions (L, B, D), and the last one's output (B, T, D)."""
        module, teacher = cast(Student, self._student.module), cast(Teacher, self._teacher.module)
        batch = batch.to(self._student.topology.device)
        shared = None
        if teacher.section.starts and not teacher.owns_features(batch.modality):
            was_training = module.training
            module.eval()
            shared = module.stem_features(batch)
            module.train(was_training)
        states = self._teacher.encoder_features(batch, shared, layers)
        valid_bt = cast(Layered, self._teacher.encoder).valid_positions(batch)
        return torch.stack([mean_over_positions(x_btd, valid_bt) for x_btd in states]), states[-1]


def first_batches(batches: LabelledBatches, samples: int, size: int) -> tuple[Batch, Tensor]:
    """The first batches as one, padded to the longest; the first one at least, as long as all fit the limits.

    `size`: of the inputs, bytes. Nothing may be masked in them.
    """
    taken: list[tuple[Batch, Tensor]] = []
    for batch, labels_b in batches:
        longest = max(one.inputs[0].nbytes for one, _ in [*taken, (batch, labels_b)])
        count = sum(len(labels) for _, labels in taken) + len(labels_b)
        if taken and (count > samples or count * longest > size):
            break
        taken.append((batch, labels_b))
    first = taken[0][0]
    if len(taken) == 1:
        return first, taken[0][1]
    length = max(one.inputs.shape[-1] for one, _ in taken)
    positions = max(one.masked_rt.shape[1] for one, _ in taken)

    def padded(x: Tensor, wanted: int) -> Tensor:
        return F.pad(x, (0, wanted - x.shape[-1]))

    def valid(one: Batch) -> Tensor:
        # Of a line of values what is said of each of them, of arrays of positions (`Batch.valid`).
        places = one.inputs if one.inputs.dim() == 2 else one.masked_rt
        return torch.ones_like(places, dtype=torch.bool) if one.valid is None else one.valid

    def real(one: Batch) -> Tensor:
        return torch.ones_like(one.masked_rt) if one.real_bt is None else one.real_bt

    said = max(valid(one).shape[1] for one, _ in taken)
    alike = all(one.valid is None and one.inputs.shape[1:] == first.inputs.shape[1:] for one, _ in taken)
    cut: dict[str, Any] = {"layout": None, "keys": tuple(key for one, _ in taken for key in one.keys)}
    joined = replace(
        first,
        **cut,
        inputs=torch.cat([padded(one.inputs, length) for one, _ in taken]),
        valid=torch.cat([padded(valid(one), said) for one, _ in taken]) if not alike else None,
        masked_rt=torch.cat([padded(one.masked_rt, positions) for one, _ in taken]),
        grid=max((one.grid for one, _ in taken), key=math.prod),
        real_bt=None
        if all(one.real_bt is None for one, _ in taken)
        else torch.cat([padded(real(one), positions) for one, _ in taken]),
        sample_ids=torch.cat([one.sample_ids for one, _ in taken]),
    )
    return joined, torch.cat([labels_b for _, labels_b in taken])


def rows(batch: Batch, start: int, stop: int) -> Batch:
    """Some samples of a batch in which nothing is masked."""
    cut: dict[str, Any] = {name: getattr(batch, name)[start:stop] for name in ("inputs", "masked_rt", "sample_ids")}
    said = {"valid": batch.valid, "real_bt": batch.real_bt}
    cut |= {name: None if x is None else x[start:stop] for name, x in said.items()} | {"layout": None}
    return replace(batch, **cut, keys=batch.keys[start:stop])
