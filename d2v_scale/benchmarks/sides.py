"""What takes turns in a benchmark of the step: this project, and the peers it is compared with."""

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2v_scale.batch import Batch, masked_targets
from d2v_scale.benchmarks.cases import Case
from d2v_scale.data2vec.loss import cls_loss_sum, masked_loss_sum
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.optim import make_optimizer, parameter_groups, set_rates
from d2v_scale.parallel import ds_config
from d2v_scale.parallel.config import ParallelConfig
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import build_student
from d2v_scale.pretraining.step import count_step, train_step
from d2v_scale.process.profiling import part
from d2v_scale.teacher.sharded import ShardedTeacher

Precision = Literal["fp32", "bf16"]
DECAY = 0.999
PHASES = ("student", "teacher", "backward", "optimizer", "ema")


class Side(ABC):
    """One way to do a pretraining step. Its phases are `profiling.part`s named as in `PHASES`."""

    @abstractmethod
    def loss(self, batch: Batch, noise_rtd: Tensor) -> float:
        """The loss without dropout; changes nothing. `noise_rtd`: the decoder's mask tokens (2.0), (R, T, D)."""

    @abstractmethod
    def step(self, batch: Batch, number: int) -> None:
        """One step: student, teacher, loss, backward, clipping, optimizer, EMA."""

    def close(self) -> None:  # noqa: B027
        """Give the memory back. Nothing to do where Python does it."""


class Ours(Side):
    """What `train.py` runs, at ZeRO-1 unless `deepspeed` says otherwise."""

    def __init__(
        self,
        case: Case,
        topology: Topology,
        precision: Precision = "fp32",
        deepspeed: dict[str, Any] | None = None,
    ) -> None:
        self.recipe = recipe = case.recipe
        self.topology = topology
        numbers = ds_config.RecipeNumbers(precision=precision, clip=recipe.optim.clip)
        raw = deepspeed or {"zero_optimization": {"stage": 1}}
        config = ds_config.resolve(raw, numbers, ParallelConfig(), topology.world_size)
        self.student = build_student(
            lambda: Student(recipe.model),
            config,
            lambda named: make_optimizer(parameter_groups(named, recipe.optim), recipe.optim),
            topology,
            lambda module: initialize(module, recipe.seed),
        )
        parts = recipe.parts()
        self.teacher = ShardedTeacher(
            lambda: Teacher(recipe.model, recipe.targets(), parts),
            self.student,
            recipe.teacher,
            config,
            topology,
            parts.role,
        )

    def loss(self, batch: Batch, noise_rtd: Tensor) -> float:
        config = self.recipe.objective.loss
        self.student.module.eval()
        with torch.no_grad():
            output = self.student(batch, Draw(1, 0), noise_rtd)
            targets_btd = self.teacher(batch, output.features_btd)
            targets_nd = masked_targets(targets_btd, batch)
            counts = count_step([batch], self.topology)[0]
            width = targets_btd.shape[-1]
            total = masked_loss_sum(output.predictions_nd, targets_nd, config, width) / counts[0]
            if config.cls_weight > 0 and output.cls_rd is not None:
                total = total + cls_loss_sum(output.cls_rd, targets_btd, config, width) / counts[1]
        self.student.module.train()
        return float(total)

    def step(self, batch: Batch, number: int) -> None:
        set_rates(self.student.optimizer, self.recipe.optim, self.recipe.optim.warmup_steps)
        train_step(self.student, self.teacher, [batch], self.recipe.objective, Draw(1, number), observe=False)

    def close(self) -> None:
        self.teacher.wait()
        self.teacher.destroy()
        self.student.destroy()


class Naive(Side):
    """The same modules with nothing done to make them fast.

    Every clone is a sample of its own, for the teacher too; the teacher computes its own stem; gradients everywhere;
    torch's default AdamW; one EMA operation after the other.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.recipe = recipe = case.recipe
        self.student = Student(recipe.model).to(device)
        initialize(self.student, recipe.seed)
        parts = recipe.parts().__class__(with_predictor=True)
        self.teacher = Teacher(recipe.model, recipe.targets(), parts).to(device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.optimizer = default_adamw(self.student.parameters(), recipe.optim)

    def _spread(self, batch: Batch) -> Batch:
        clones = batch.clones
        student_inputs = batch.student_inputs
        return Batch(
            modality=batch.modality,
            inputs=batch.inputs.repeat_interleave(clones, 0),
            valid=None,
            masked_rt=batch.masked_rt,
            student_inputs=student_inputs,
            sample_ids=batch.sample_ids.repeat_interleave(clones),
            grid=batch.grid,
            extra_tokens=batch.extra_tokens,
            layout=batch.layout,
        )

    def _loss(self, batch: Batch, draw: Draw, noise_rtd: Tensor | None) -> Tensor:
        config = self.recipe.objective.loss
        with part("student"):
            output = self.student(batch, draw, noise_rtd)
        with part("teacher"):
            targets_btd = self.teacher(batch)
        targets_nd = targets_btd[batch.masked_rt]
        width = targets_btd.shape[-1]
        total = masked_loss_sum(output.predictions_nd, targets_nd, config, width) / targets_nd.shape[0]
        if config.cls_weight > 0 and output.cls_rd is not None:
            total = total + cls_loss_sum(output.cls_rd, targets_btd, config, width) / output.cls_rd.shape[0]
        return total

    def loss(self, batch: Batch, noise_rtd: Tensor) -> float:
        self.student.eval()
        with torch.no_grad():
            total = float(self._loss(self._spread(batch), Draw(1, 0), noise_rtd))
        self.student.train()
        return total

    def step(self, batch: Batch, number: int) -> None:
        total = self._loss(self._spread(batch), Draw(1, number), None)
        finish_plainly(total, self.optimizer, self.recipe.optim.clip, self.student, self.student, self.teacher)


def default_adamw(parameters: Any, config: Any, **options: Any) -> torch.optim.AdamW:
    """torch's AdamW as it comes."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, **options
    )


def finish_plainly(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    clip: float,
    student: nn.Module,
    averaged: nn.Module,
    teacher: nn.Module,
) -> None:
    """Backward, clipping, optimizer and EMA as a short script has them. `averaged`: what the teacher follows."""
    with part("backward"):
        optimizer.zero_grad()
        loss.backward()
    with part("optimizer"):
        if clip > 0:
            torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.step()
    with part("ema"), torch.no_grad():
        ours = dict(averaged.named_parameters())
        for name, parameter in teacher.named_parameters():
            parameter.mul_(DECAY).add_(ours[name], alpha=1 - DECAY)
