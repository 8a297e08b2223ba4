"""What a fine-tuning run takes from the pretrained encoder before anything is built."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from d2v_scale.command_line import RECIPES, Options, parse
from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.model.config import ModelConfig
from d2v_scale.recipe import Recipe
from d2v_scale.run_files.given_model import asked_otherwise
from d2v_scale.run_files.run_start import RECIPE_FILE, goes_on

if TYPE_CHECKING:
    from d2v_scale.interop.encoder_source import EncoderSource


def adopt(recipe: Recipe, options: Options) -> "EncoderSource | None":
    """Give `recipe` the sizes of the encoder that `--init_from` names and the normalisation it was trained with.

    Regularisation is the task's (`task.backbone`). A run that began already has all this in its directory: the
    encoder may be gone then. Returns the encoder; None to start from scratch or to continue. Raises CheckpointError,
    and ConfigError where the user asks for another model.
    """
    assert recipe.task is not None
    source = None
    if options.init_from is not None:
        run_dir = None if options.run_dir is None else Path(options.run_dir)
        if run_dir is not None and (run_dir / RECIPE_FILE).is_file() and goes_on(run_dir):
            _take_over(recipe, parse(["--recipe", str(run_dir / RECIPE_FILE)])[0])
        else:
            if not Path(options.init_from).exists():
                raise CheckpointError(f"{options.init_from} does not exist.")
            from d2v_scale.interop.encoder_source import open_encoder  # which imports torch

            source = open_encoder(options.init_from, recipe.task.weights)
            _take_over(recipe, source.recipe)
    for name, value in dataclasses.asdict(recipe.task.backbone).items():
        if value is not None:
            setattr(recipe.model.backbone, name, value)
    return source


def _refuse_overrides(recipe: Recipe, encoder: ModelConfig) -> None:
    """Raises ConfigError where the user asks for another model than the encoder is: not with the model that a named
    recipe has for training from scratch, but with what differs from it."""
    assert recipe.task is not None
    is_named = (RECIPES / f"{recipe.name}.yaml").is_file()
    usual = parse(["--recipe", recipe.name])[0].model if is_named else ModelConfig()
    decided = dataclasses.asdict(recipe.task.backbone)
    free = {"activation_checkpointing", *(f"backbone.{name}" for name, value in decided.items() if value is not None)}
    for name, (here, there) in asked_otherwise(recipe.model, usual, encoder).items():
        if name not in free:
            raise ConfigError(
                f"model.{name}",
                f"is {here!r} in the recipe, {there!r} in the encoder",
                "Leave it out: the model is the encoder's. Dropouts are changed with task.backbone.*.",
            )


def _take_over(recipe: Recipe, pretrained: Recipe) -> None:
    _refuse_overrides(recipe, pretrained.model)
    recomputes = recipe.model.activation_checkpointing
    recipe.model = dataclasses.replace(pretrained.model, activation_checkpointing=recomputes)
    if recipe.data.sources and recipe.data.sources[0].modality in recipe.model.modalities:
        # Of several stems, the one that the labelled data go through.
        recipe.model = recipe.model.alone(recipe.data.sources[0].modality)
    recipe.objective = pretrained.objective
    recipe.data.vision.mean, recipe.data.vision.std = pretrained.data.vision.mean, pretrained.data.vision.std
    recipe.data.speech.normalize = pretrained.data.speech.normalize
