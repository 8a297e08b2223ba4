"""A fine-tuned model in one process and without DeepSpeed: for evaluation and export checks."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.errors import CheckpointError
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.evaluation import Answers, answers
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.finetuning.step import frames_of
from d2v_scale.interop.encoder_source import EncoderSource, open_encoder, write_tensors
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import groups
from d2v_scale.recipe import Recipe


@dataclass
class TaskPredictor:
    """Runs a fine-tuned model. Its parameters are fp32."""

    model: TaskModel
    recipe: Recipe
    task: TaskConfig
    source: EncoderSource
    device: torch.device

    @classmethod
    def load(cls, path: str | Path) -> "TaskPredictor":
        """The model of a run, of one of its checkpoints or of an exported folder. Raises CheckpointError."""
        source = open_encoder(path, "student")
        task = source.recipe.task
        if task is None:
            raise CheckpointError(f"{source.path} was pretrained and has no head.", "Fine-tune it first.")
        topology = groups.single_process()
        model = TaskModel(source.recipe.model, task)
        write_tensors(model, source, "")
        return cls(model.to(topology.device).eval(), source.recipe, task, source, topology.device)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """(B, outputs), for CTC (B, T, outputs), of a batch on this model's device."""
        return self.model(batch, Draw(0, 0))

    def answers(self, batch: Batch, labels: Tensor) -> Answers:
        """What the model says of each sample, beside its label."""
        batch = batch.to(self.device)
        logits = self.logits(batch)
        frames_b = frames_of(self.model, batch, logits) if self.task.kind == "ctc" else None
        return answers(self.task, logits, labels, frames_b)
