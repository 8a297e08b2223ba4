"""An encoder from a checkpoint, in one process and without DeepSpeed: for probes, pictures and export checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from d2v_scale.batch import Batch
from d2v_scale.interop.encoder_source import EncoderSource, open_encoder, write_encoder
from d2v_scale.model.init import initialize
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.stack import Teacher
from d2v_scale.parallel import groups
from d2v_scale.recipe import Recipe

Weights = Literal["teacher", "student", "random"]


@dataclass
class FrozenEncoder:
    """Runs an encoder on unmasked batches. Its parameters are fp32."""

    model: Teacher
    recipe: Recipe
    device: torch.device
    source: Path
    step: int
    weights: Weights
    run_dir: Path | None = None
    """The run that made it, where it is known."""
    tokenizer_sha256: str | None = None
    """Checksum of the tokenizer of the text that it was trained on, where it is known."""

    @classmethod
    def load(cls, path: str | Path, weights: Weights = "teacher") -> "FrozenEncoder":
        """The encoder of a checkpoint (or the newest one of a run directory) or of an exported folder, on the GPU if
        there is one.

        `teacher`: averaged tensors from the teacher, shared ones (conv stack, embeddings) from the student;
        `student`: all from the student; `random`: as the run began, to compare with. Raises CheckpointError.
        """
        source = open_encoder(path, "student" if weights == "student" else "teacher")
        return cls.of(source, weights, groups.single_process().device)

    @classmethod
    def of(cls, source: EncoderSource, weights: Weights, device: torch.device) -> "FrozenEncoder":
        """Likewise, of a source that is open, on `device`. Needs no process group. Raises CheckpointError."""
        model = _built(source.recipe)
        if weights != "random":
            write_encoder(model, source)
        return cls(
            model.to(device),
            source.recipe,
            device,
            source.path,
            source.step,
            weights if weights == "random" else source.weights,
            source.run_dir,
            source.tokenizer_sha256,
        )

    @classmethod
    def untrained(cls, recipe: Recipe) -> "FrozenEncoder":
        """The encoder as a run of this recipe begins, without a checkpoint."""
        device = groups.single_process().device
        return cls(_built(recipe).to(device), recipe, device, Path(), 0, "random")

    def hidden_states(self, batch: Batch, layers: list[int] | None = None) -> list[Tensor]:
        """The outputs (B, T, D) of these main blocks (None: of every one; negative numbers count from the end) on a
        batch on this encoder's device, nothing masked, no CLS."""
        return self.model.features(
            batch, None, list(range(self.recipe.model.backbone.depth)) if layers is None else layers
        )

    def valid_positions(self, batch: Batch) -> Tensor | None:
        """bool (B, T), True where a position is real; None: all are."""
        return self.model.valid_positions(batch)


def _built(recipe: Recipe) -> Teacher:
    """The encoder as a run of this recipe begins, whole, on the CPU."""
    with undivided():
        # Nothing shared: this encoder owns the stem too. How targets were made does not matter, and need not be known.
        model = Teacher(recipe.model, None, TeacherParts())
    initialize(model, recipe.seed)
    return model
