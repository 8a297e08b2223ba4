"""What a fine-tuning run takes from the pretrained encoder before anything is built."""

import dataclasses
from pathlib import Path

from d2v_scale.checkpoint.commit import committed_steps
from d2v_scale.command_line import RECIPE_FILE, Options, parse
from d2v_scale.interop.encoder_source import EncoderSource, open_encoder
from d2v_scale.recipe import Recipe


def adopt(recipe: Recipe, options: Options) -> EncoderSource | None:
    """Give `recipe` the sizes of the encoder that `--init_from` names and the normalisation it was trained with.

    Regularisation is the task's (`task.backbone`). A run that began already has all this in its directory: the
    encoder may be gone then. Returns the encoder; None to start from scratch or to continue. Raises CheckpointError.
    """
    assert recipe.task is not None
    source = None
    if options.init_from is not None:
        run_dir = None if options.run_dir is None else Path(options.run_dir)
        if run_dir is not None and (run_dir / RECIPE_FILE).is_file() and committed_steps(run_dir / "checkpoints"):
            _take_over(recipe, parse(["--recipe", str(run_dir / RECIPE_FILE)])[0])
        else:
            source = open_encoder(options.init_from, recipe.task.weights)
            _take_over(recipe, source.recipe)
    for name, value in dataclasses.asdict(recipe.task.backbone).items():
        if value is not None:
            setattr(recipe.model.backbone, name, value)
    return source


def _take_over(recipe: Recipe, pretrained: Recipe) -> None:
    recomputes = recipe.model.activation_checkpointing
    recipe.model = dataclasses.replace(pretrained.model, activation_checkpointing=recomputes)
    if recipe.data.sources and recipe.data.sources[0].modality in recipe.model.modalities:
        # Of several stems, the one that the labelled data go through.
        for modality in recipe.model.modalities:
            if modality != recipe.data.sources[0].modality:
                setattr(recipe.model, modality, None)
    recipe.objective = pretrained.objective
    recipe.data.vision.mean, recipe.data.vision.std = pretrained.data.vision.mean, pretrained.data.vision.std
    recipe.data.speech.normalize = pretrained.data.speech.normalize
