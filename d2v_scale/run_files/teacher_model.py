"""What a pretraining run takes from the encoder that is its teacher before anything is built: its model."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.recipe import Recipe
from d2v_scale.run_files import recipe_file
from d2v_scale.run_files.run_start import RECIPE_FILE

if TYPE_CHECKING:
    from d2v_scale.command_line import Options
    from d2v_scale.interop.encoder_source import EncoderSource

REMEDY = "Name the run, checkpoint or exported folder of the teacher."


def adopt_teacher(recipe: Recipe, options: "Options") -> "EncoderSource | None":
    """Enter what the encoder that `teacher.checkpoint` names is made of; returns it, and None where there is none.

    A run that has its teacher in its own checkpoints needs it no more: it may be gone, and None is returned then, too.
    Raises CheckpointError where it is missing or damaged, and ConfigError where it does not fit the recipe.
    """
    teacher = recipe.teacher
    if teacher.kind != "checkpoint":
        return None
    if teacher.checkpoint is None:
        raise ConfigError("teacher.checkpoint", "is not set", REMEDY)
    if options.reset_teacher:
        raise ConfigError(
            "reset_teacher", "is true, but the teacher is that of teacher.checkpoint", "Leave one of them out."
        )
    from d2v_scale.interop.encoder_source import open_encoder, parse_recipe  # which import torch

    if not Path(teacher.checkpoint).exists():
        kept = None if options.run_dir is None else Path(options.run_dir) / RECIPE_FILE
        if kept is not None and kept.is_file():
            teacher.model = parse_recipe(recipe_file.load(kept), kept).teacher.model
        elif options.resume is None:
            raise CheckpointError(
                f"teacher.checkpoint: {teacher.checkpoint} does not exist.",
                REMEDY,
            )
        return None
    source = open_encoder(teacher.checkpoint)
    teacher.model = replace(source.recipe.model, compile=False, activation_checkpointing=False)
    _check_normalisation(recipe, source.recipe)
    return source


def _check_normalisation(recipe: Recipe, of_teacher: Recipe) -> None:
    """Raises ConfigError where inputs are normalised in another way than those that the teacher was trained on."""
    kinds = {recipe.model.kind(name) for name in recipe.model.modalities}
    for kind, section, field in (
        ("vision", "vision", "mean"),
        ("vision", "vision", "std"),
        ("speech", "speech", "normalize"),
    ):
        here, there = (getattr(getattr(one.data, section), field) for one in (recipe, of_teacher))
        if kind in kinds and here != there:
            raise ConfigError(
                f"data.{section}.{field}", f"is {here}, and {there} where the teacher was trained", "Give the same."
            )
