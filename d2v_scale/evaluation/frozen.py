"""An encoder from a checkpoint, in one process and without DeepSpeed: for probes, pictures and export checks."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from d2v_scale.checkpoint import Checkpoint, open_any
from d2v_scale.data.batch import Batch
from d2v_scale.errors import CheckpointError
from d2v_scale.model.config import TeacherParts
from d2v_scale.model.init import initialize
from d2v_scale.model.stack import Teacher
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

    @classmethod
    def load(cls, path: str | Path, weights: Weights = "teacher") -> "FrozenEncoder":
        """The encoder of a checkpoint (or the newest one of a run directory), on the GPU if there is one.

        `teacher`: averaged tensors from the teacher, shared ones (conv stack, embeddings) from the student;
        `student`: all from the student; `random`: as the run began, to compare with. Raises CheckpointError.
        """
        checkpoint = open_any(path)
        recipe = recipe_of(checkpoint)
        topology = groups.single_process()
        # Nothing shared: this encoder owns the stem too.
        model = Teacher(recipe.model, recipe.objective.target, TeacherParts())
        if weights == "random":
            initialize(model, recipe.seed)
        else:
            _fill(model, checkpoint, weights)
        return cls(model.to(topology.device), recipe, topology.device, checkpoint.path, checkpoint.step, weights)

    def hidden_states(self, batch: Batch) -> list[Tensor]:
        """The output (B, T, D) of every main block on a batch on this encoder's device, nothing masked, no CLS."""
        return self.model.features(batch, None, list(range(self.recipe.model.backbone.depth)))

    def valid_positions(self, batch: Batch) -> Tensor | None:
        """bool (B, T), True where a position is real; None: all are."""
        return self.model.valid_positions(batch)


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """The recipe a checkpoint was made with, as the checkpoint holds it. Raises CheckpointError."""
    from jsonargparse import ArgumentError, ArgumentParser

    values = checkpoint.extra.get("recipe")
    if not isinstance(values, dict):
        raise CheckpointError(f"{checkpoint.path} does not say which recipe it was made with.")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    try:
        sections = parser.instantiate(parser.parse_object(values))
    except ArgumentError as error:
        raise CheckpointError(f"{checkpoint.path} was made with a recipe that does not fit: {error}.") from error
    return Recipe(**{field.name: sections[field.name] for field in dataclasses.fields(Recipe)})


def _fill(model: Teacher, checkpoint: Checkpoint, weights: Weights) -> None:
    """Copy every parameter from the checkpoint; one that is nowhere to be found, or of another shape, is an error."""
    order = ("teacher", "student") if weights == "teacher" else ("student",)
    held = {kind: set(checkpoint.names(kind)) for kind in order}
    named = dict(model.named_parameters())
    where = {name: next((kind for kind in order if name in held[kind]), None) for name in named}
    missing = [name for name, kind in where.items() if kind is None]
    if missing:
        raise CheckpointError(
            f"{checkpoint.path} lacks {len(missing)} of {len(named)} tensors: {', '.join(missing[:5])}."
        )
    with torch.no_grad():
        for name, parameter in named.items():
            kind = where[name]
            assert kind is not None
            tensor = checkpoint.tensor(kind, name)
            if tensor.shape != parameter.shape:
                shapes = f"is {tuple(tensor.shape)}, the recipe's model has {tuple(parameter.shape)}"
                raise CheckpointError(f"{checkpoint.path}: {name} {shapes}.")
            parameter.copy_(tensor)
