"""A recorded reference run (a fixture folder) and its replay through this package.

The recipe is derived from the fixture's own `meta.json`; nothing here is about one particular fixture.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data2vec import ema
from d2v_scale.data2vec.loss import cls_loss_sum, masked_loss_sum
from d2v_scale.errors import CheckpointError
from d2v_scale.interop.keymap import import_tensors
from d2v_scale.interop.reference_config import from_fairseq
from d2v_scale.interop.reference_names import reference_keys, teacher_prefix
from d2v_scale.interop.reference_options import Reference
from d2v_scale.interop.reference_table import recognised, row_of
from d2v_scale.interop.reference_vision import from_data2vec_vision
from d2v_scale.model.layers import StudentOutput
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher


class Fixture:
    """A folder of recorded tensors. Raises `CheckpointError` when a needed file is missing, damaged or does not fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder / 'meta.json'} cannot be read: {error}.", "Give a fixture folder."
            ) from error
        self.io = self.tensors("io")
        student, teacher = self.tensors("student_init"), self.tensors("teacher_init")
        if "config" not in self.meta:
            raise CheckpointError(f"{folder / 'meta.json'} has no 'config'.", "Give a fixture folder.")
        self.reference = self._derive(student)
        self.keymap = reference_keys(self.reference.model, self.reference.modality)
        self.teacher_prefix = teacher_prefix(self.keymap, teacher)
        self.student_init = student
        self.teacher_init = {self.teacher_prefix + key: tensor for key, tensor in teacher.items()}

    def tensors(self, name: str, *, required: bool = True) -> dict[str, Tensor]:
        """The tensors of `name`.safetensors; {} if the file is absent and not required."""
        path = self.folder / f"{name}.safetensors"
        if not required and not path.exists():
            return {}
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.", "Is the file complete?") from error

    def with_changes(self, changes: Mapping[str, Any]) -> "Fixture":
        """The same recording with other keys in the reference's configuration."""
        changed = copy.copy(self)
        changed.meta = {**self.meta, "config": {**self.meta["config"], **changes}}
        changed.reference = changed._derive(self.student_init)
        return changed

    def _derive(self, student: Mapping[str, Tensor]) -> Reference:
        shapes = {key: tuple(tensor.shape) for key, tensor in student.items()}
        config = self.meta["config"]
        recognised(shapes)  # refuses keys that are nobody's
        if "loop_config" in self.meta:
            return from_data2vec_vision(config, self.meta["loop_config"], shapes)
        rows = self.io["in.mask"].shape[0] if "in.mask" in self.io else 1
        return from_fairseq(config, shapes, self.meta.get("inputs"), rows)

    def batch(self) -> Batch:
        """The recorded inputs and mask. Raises `CheckpointError` if one is missing."""
        io, modality = self.io, self.reference.modality
        inputs, student_inputs = row_of(self.reference.model, modality).recorded_inputs(io)
        masked_rt = io.get("in.mask")
        if inputs is None or masked_rt is None:
            raise CheckpointError(
                f"{self.folder}: io.safetensors has no input or no in.mask.", "Give a fixture folder."
            )
        padded = io.get("in.padding_mask")
        stem = modalities.of(self.reference.model, modality)
        return Batch(
            modality=modality,
            inputs=inputs,
            valid=None if padded is None or not bool(padded.any()) else ~padded,
            masked_rt=masked_rt.bool(),
            student_inputs=student_inputs,
            sample_ids=torch.arange(inputs.shape[0]),
            grid=stem.fixed_grid or (),
            extra_tokens=stem.extra_tokens,
        )


class Replay:
    """Student and teacher at the fixture's initial weights, and one step of the loop at a time."""

    def __init__(self, fixture: Fixture) -> None:
        self.fixture = fixture
        reference = fixture.reference
        self.objective = reference.objective
        self.student = Student(reference.model)
        self.teacher = Teacher(reference.model, self.objective.target, reference.parts)
        load_reference(self.student, fixture, fixture.student_init, "student_init")
        load_reference(self.teacher, fixture, fixture.teacher_init, "teacher_init")
        self.batch = fixture.batch()

    def targets(self, features_btd: Tensor, batch: Batch | None = None) -> Tensor:
        """Targets (B, T, D) with the student's features where the teacher shares them."""
        return self.teacher(self.batch if batch is None else batch, features_btd)

    def forward(self, step: int) -> tuple[StudentOutput, Tensor]:
        """(student's output, targets (B, T, D)) with the decoder noise recorded for `step`."""
        output = self.student(self.batch, Draw(0, step), self.fixture.io.get(f"step{step}.decoder_noise"))
        return output, self.targets(output.features_btd)

    def at_masked(self, targets_btd: Tensor) -> Tensor:
        """Targets in the order of the predictions, (N, D)."""
        clones = self.batch.masked_rt.shape[0] // targets_btd.shape[0]
        return targets_btd.repeat_interleave(clones, dim=0)[self.batch.masked_rt]

    def loss(self, output: StudentOutput, targets_btd: Tensor) -> Tensor:
        """The loss that is minimised: a mean over masked positions, plus the CLS term's mean over rows."""
        config, width = self.objective.loss, targets_btd.shape[-1]
        positions = max(1, output.predictions_nd.shape[0])
        total = masked_loss_sum(output.predictions_nd, self.at_masked(targets_btd), config, width) / positions
        if config.cls_weight and output.cls_rd is not None:
            total = total + cls_loss_sum(output.cls_rd, targets_btd, config, width) / output.cls_rd.shape[0]
        return total

    def update_teacher(self, completed_updates: int) -> float:
        """One EMA update; the decay it used."""
        decay = ema.decay(self.objective.ema, completed_updates)
        values = dict(self.student.named_parameters())
        if not ema.is_frozen(decay):
            for name, parameter in self.teacher.named_parameters():
                copied = self.fixture.reference.parts.role(name) == "copied"
                ema.average_([parameter], [values[name]], 0.0 if copied else decay)
        return decay


@torch.no_grad()
def load_reference(module: nn.Module, fixture: Fixture, tensors: Mapping[str, Tensor], what: str) -> None:
    """Write reference tensors into a student or teacher. Raises `CheckpointError` unless every key matches."""
    parameters = dict(module.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    ours, report = import_tensors(fixture.keymap, tensors, shapes)
    report.require_complete(f"{fixture.folder / what}.safetensors")
    for name, parameter in parameters.items():
        parameter.copy_(ours[name])
