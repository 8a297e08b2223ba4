"""What a pretraining run takes from the encoder that is its teacher before anything is built: its model."""

from dataclasses import replace
from pathlib import Path

from d2v_scale.command_line import RECIPES, Options, default_run_dir, parse
from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.model.config import ModelConfig
from d2v_scale.recipe import Recipe
from d2v_scale.run_files.given_model import asked_otherwise
from d2v_scale.run_files.run_start import RECIPE_FILE, goes_on

REMEDY = "Name the run, checkpoint or exported folder of the teacher."


def adopt_teacher(recipe: Recipe, options: Options) -> None:
    """Enter in `recipe` what the encoder that `teacher.checkpoint` names is made of, where there is one.

    A run that goes on has its teacher in its own checkpoints: what it began from is not looked at, may be gone or
    another by now, and stays what the recipe names. Raises CheckpointError where the encoder is missing, and
    ConfigError where it does not fit the recipe or is not the one that the run began with. Checksums are left to those
    who read the weights.
    """
    teacher = recipe.teacher
    if teacher.kind != "checkpoint":
        return
    if teacher.checkpoint is None:
        raise ConfigError("teacher.checkpoint", "is not set", REMEDY)
    if options.reset_teacher:
        raise ConfigError(
            "reset_teacher", "is true, but the teacher is that of teacher.checkpoint", "Leave one of them out."
        )
    run_dir = Path(options.run_dir or options.resume or default_run_dir(recipe, ""))  # a requeued job's is the same
    if (run_dir / RECIPE_FILE).is_file() and goes_on(run_dir):
        _go_on(recipe, run_dir)
        return
    if not Path(teacher.checkpoint).exists():
        raise CheckpointError(f"teacher.checkpoint: {teacher.checkpoint} does not exist.", REMEDY)
    from d2v_scale.interop.encoder_source import open_encoder  # which imports torch

    of_teacher = open_encoder(teacher.checkpoint, checksums=False).recipe
    _check_given_model(recipe, of_teacher.model)
    teacher.model = replace(of_teacher.model, compile=False, activation_checkpointing=False)
    _check_normalisation(recipe, of_teacher)


def _go_on(recipe: Recipe, run_dir: Path) -> None:
    """Take the teacher that the checkpoints of the run in `run_dir` hold. Raises ConfigError where another is named."""
    teacher = recipe.teacher
    held = parse(["--recipe", str(run_dir / RECIPE_FILE)])[0].teacher
    assert teacher.checkpoint is not None
    if held.kind != "checkpoint" or held.checkpoint is None:
        raise ConfigError(
            "teacher.kind",
            f"is 'checkpoint', but the run in {run_dir} goes on with the teacher of its checkpoints ({held.kind})",
            "Leave it as it was, or begin a new run from its weights with --init_from.",
        )
    # A link may lead elsewhere by now, or nowhere: it is the same name.
    if str(Path.cwd() / teacher.checkpoint) != held.checkpoint and (
        Path(teacher.checkpoint).resolve() != Path(held.checkpoint).resolve()
    ):
        raise ConfigError(
            "teacher.checkpoint",
            f"is {teacher.checkpoint}, but the checkpoints of the run in {run_dir} hold the teacher of "
            f"{held.checkpoint}, with which it goes on",
            "Leave it as it was, or begin a new run from its weights with --init_from.",
        )
    teacher.checkpoint, teacher.model = held.checkpoint, held.model


def _check_given_model(recipe: Recipe, of_teacher: ModelConfig) -> None:
    """Raises ConfigError where the user asks for another model than the teacher is: not with the one that a named
    recipe has for its usual teacher, but with what differs from it."""
    given = recipe.teacher.model
    if given is None:
        return
    is_named = (RECIPES / f"{recipe.name}.yaml").is_file()
    usual = parse(["--recipe", recipe.name])[0].teacher.model if is_named else None
    for name, (here, there) in asked_otherwise(given, usual or ModelConfig(), of_teacher).items():
        if name not in ("compile", "activation_checkpointing"):
            raise ConfigError(
                f"teacher.model.{name}",
                f"is {here!r}, but {there!r} in the encoder of {recipe.teacher.checkpoint}",
                "Leave it out: the teacher's model is that of its encoder.",
            )


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
