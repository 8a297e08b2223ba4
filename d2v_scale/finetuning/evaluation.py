"""A fine-tuned model on held-out labelled samples, divided over the ranks."""

from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data.labels import Vocabulary
from d2v_scale.finetuning import metrics
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.decoding import beam_search, greedy
from d2v_scale.finetuning.loading import class_count, held_out_labels
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.finetuning.step import frames_of
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.recipe import Recipe
from d2v_scale.shards.class_names import agreed_classes

Answers = list[tuple[Any, Any]]
"""What was said of each sample, and its label: numbers or texts."""


def answers(task: TaskConfig, logits: Tensor, labels: Tensor, frames_b: Tensor | None) -> Answers:
    """Of a batch: (class, class), (score, score) or (text, text). `labels` are those of `held_out_labels`."""
    if task.kind == "classify":
        return list(zip(logits.argmax(dim=-1).tolist(), labels.tolist(), strict=True))
    if task.kind == "regress":
        return list(zip(logits[:, 0].tolist(), labels.tolist(), strict=True))
    assert frames_b is not None
    vocabulary = Vocabulary(task.ctc.letters)
    found = []
    log_probs_btc = logits.float().log_softmax(dim=-1).cpu().numpy()
    for log_probs_tc, frames, points_u in zip(log_probs_btc, frames_b.tolist(), labels.tolist(), strict=True):
        frames_tc = log_probs_tc[:frames]
        heard = greedy(frames_tc) if task.ctc.beam == 1 else beam_search(frames_tc, task.ctc.beam)
        found.append((vocabulary.decode(heard), "".join(chr(point) for point in points_u if point >= 0)))
    return found


def measure(task: TaskConfig, found: Answers) -> dict[str, float]:
    """The task's metrics of all answers."""
    guessed, labels = [guess for guess, _ in found], [label for _, label in found]
    if task.kind == "ctc":
        return metrics.of_texts(guessed, labels, task.chosen_metrics())
    of = metrics.of_classes if task.kind == "classify" else metrics.of_scores
    return of(np.array(guessed), np.array(labels), task.chosen_metrics())


def outside_vocabulary(task: TaskConfig, found: Answers) -> dict[str, int]:
    """Of CTC: how many characters of the held-out texts the head cannot answer. Each is an error."""
    if task.kind != "ctc":
        return {}
    vocabulary = Vocabulary(task.ctc.letters)
    unknown = sum(int((vocabulary.encode(text) == vocabulary.unknown).sum()) for _, text in found)
    return {"outside_vocabulary": unknown}


class TaskEvaluation:
    """The recipe's held-out set; each rank decodes and answers its share."""

    def __init__(self, task: TaskConfig, labelled: LabelledSet, student: StudentEngine) -> None:
        """Raises DataError when nothing of the set can be read."""
        self._task, self._labelled, self._student = task, labelled, student
        first = next(iter(labelled), None)
        if first is None:
            raise labelled.nothing_readable()
        self._spare = first

    @classmethod
    def of(cls, recipe: Recipe, student: StudentEngine, classes: list[str]) -> "TaskEvaluation | None":
        """The set that `evaluation.test`, or the stem's own, names; None where it names none. `classes`: names of those
        that are learned. Raises DataError and ConfigError, also where the set has others."""
        task = recipe.task
        assert task is not None
        [modality] = recipe.model.modalities
        shards, limit = recipe.evaluation.of(modality).test, recipe.evaluation.max_test
        if shards is None:
            return None
        labelled = LabelledSet(shards, modality, recipe.data, recipe.model, limit=limit, labels=held_out_labels(task))
        names = agreed_classes([("the training shards", classes), (shards, labelled.classes)])
        if task.kind == "classify":
            class_count(task, names)
        return cls(task, labelled, student)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The task's metrics, of how many `samples` they are, how many were `lost`, and for CTC how many characters are
        `outside_vocabulary`. Collective: all ranks must call; all get the same."""
        student, topology = self._student, self._student.topology
        rank, size = topology.data_parallel_rank, topology.data_parallel_size
        was_training = student.module.training
        student.module.eval()
        mine: Answers = []
        batches = self._labelled.share(rank, size)
        for _ in range(-(-self._labelled.batches // size)):
            # A rank without a batch answers another one in vain: a sharded forward needs every rank.
            batch = next(batches, None)
            found = self._answers(*(batch or self._spare))
            mine += found if batch is not None else []
        student.module.train(was_training)
        everyone = [mine]
        if size > 1:
            everyone = [[] for _ in range(size)]
            dist.all_gather_object(everyone, mine, group=topology.data_parallel_group)
        found = [answer for part in everyone for answer in part]
        sizes = {"samples": len(found), "lost": len(self._labelled) - len(found)}
        return {**measure(self._task, found), **sizes, **outside_vocabulary(self._task, found)}

    def _answers(self, batch: Batch, labels: Tensor) -> Answers:
        batch = batch.to(self._student.topology.device)
        logits = self._student(batch, Draw(0, 0))
        model = cast(TaskModel, self._student.module)
        frames_b = frames_of(model, batch, logits) if self._task.kind == "ctc" else None
        return answers(self._task, logits, labels, frames_b)
