"""One step of fine-tuning: forward, loss, backward, optimizer."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.data.labels import Vocabulary
from d2v_scale.data2vec.stateless import key
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.mixing import erase, mix, soft_targets
from d2v_scale.finetuning.model import TaskModel, outputs_of
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StepResult, StudentEngine
from d2v_scale.process.profiling import part


@dataclass
class TaskObservations:
    """What the step leaves for the log, on the device."""

    loss: Tensor
    """This rank's share of the step's loss: the sum over ranks is the loss."""
    rows: Tensor
    """Labelled rows of the whole step."""


def count_rows(batches: list[Batch], topology: Topology) -> Tensor:
    """Labelled rows of the whole step: float64 scalar on the device. Collective over the data-parallel group."""
    # A rank that has no sample in this step runs a blank row, which has no key and must not count.
    rows = sum(bool(sample_key) for batch in batches for sample_key in batch.keys)
    count = torch.tensor(rows, dtype=torch.float64).to(topology.device, non_blocking=True)
    topology.sum_over_replicas(count)
    return count.clamp(min=1)


def task_step(
    student: StudentEngine, batches: list[Batch], task: TaskConfig, draw: Draw
) -> tuple[StepResult, TaskObservations]:
    """Run one step over this rank's micro-batches. Collective: all ranks must call.

    The loss is a sum over rows (images, texts, recordings) divided by their number over all ranks and micro-batches.
    """
    topology = student.topology
    rows = count_rows(batches, topology)
    factor = topology.data_parallel_size * len(batches)
    observations = TaskObservations(torch.zeros((), dtype=torch.float64, device=topology.device), rows)
    student.add_loss_in(observations.loss)
    learns = student.completed_updates >= task.freeze_updates
    for micro, batch in enumerate(batches):
        torch.manual_seed(key(draw.seed, "dropout", draw.step, topology.data_parallel_rank, micro) >> 1)
        with part("student"):
            share = loss_sum(student, batch, task, draw, learns=learns) / rows.float()
        observations.loss += share.detach()
        with part("backward"):
            student.backward(share * factor)
    with part("optimizer"):
        return student.step(), observations


def loss_sum(student: StudentEngine, batch: Batch, task: TaskConfig, draw: Draw, *, learns: bool) -> Tensor:
    """fp32 scalar: the sum of the rows' losses; rows without a label add nothing. Collective."""
    labels = batch.labels
    assert labels is not None
    if task.kind == "classify":
        targets_bc = soft_targets(labels, outputs_of(task), task.label_smoothing)
        if task.image.changes_batches:
            images = erase(batch.inputs, task.image.erase, batch.sample_ids, draw.seed, draw.step)
            batch.inputs, targets_bc = mix(images, targets_bc, task.image, draw.seed, draw.step)
        logits_bc = student(batch, draw, learns=learns).float()
        return -(targets_bc * F.log_softmax(logits_bc, dim=-1)).sum()
    logits = student(batch, draw, learns=learns).float()
    if task.kind == "regress":
        known_b = ~labels.isnan()
        return ((logits[:, 0] - labels.nan_to_num()).square() * known_b).sum()
    return ctc_loss_sum(logits, labels, frames_of(cast(TaskModel, student.module), batch, logits))


def frames_of(model: TaskModel, batch: Batch, logits_btc: Tensor) -> Tensor:
    """int64 (B,): real frames of each recording."""
    valid_bt = model.encoder.valid_positions(batch)
    if valid_bt is None:
        return torch.full((logits_btc.shape[0],), logits_btc.shape[1], device=logits_btc.device)
    return valid_bt.sum(dim=1)


def ctc_loss_sum(logits_btc: Tensor, characters_bu: Tensor, frames_b: Tensor) -> Tensor:
    """fp32 scalar: the sum of the rows' CTC losses. `characters_bu` is filled with -1; a row that cannot be spelled in
    its frames adds nothing (the reference's zero-infinity), nor does one without characters."""
    lengths_b = (characters_bu >= 0).sum(dim=1)
    log_probs_tbc = logits_btc.float().log_softmax(dim=-1).transpose(0, 1)
    losses_b = F.ctc_loss(
        log_probs_tbc,
        characters_bu.clamp(min=0),
        frames_b,
        lengths_b,
        blank=Vocabulary.blank,
        reduction="none",
        zero_infinity=True,
    )
    return (losses_b * (lengths_b > 0)).sum()
