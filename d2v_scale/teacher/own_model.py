"""A teacher that is another encoder: whether it fits the student that is trained beside it, and the topology."""

from typing import TYPE_CHECKING

from d2v_scale.errors import ConfigError
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.teacher_parts import TeacherParts

if TYPE_CHECKING:
    from d2v_scale.recipe import Recipe

_READ = {
    "vision": ("image_size", "patch_size", "channels"),
    "speech": ("steps",),
    "text": ("vocab_size", "bos_id", "pad_id", "eos_id", "unk_id", "mask_id"),
    "array": ("key", "channels", "axes", "transform", "log_floor", "log_mel", "normalise", "mean", "std", "missing"),
}
"""By kind of stem, what decides about the inputs of a batch, of which student and teacher get the same."""


def check(recipe: "Recipe") -> None:
    """Raises ConfigError for a teacher that contradicts itself, its student or the topology. Pure."""
    teacher = recipe.teacher
    if teacher.kind != "checkpoint":
        for name in ("checkpoint", "model"):
            if getattr(teacher, name) is not None:
                raise ConfigError(
                    f"teacher.{name}",
                    f"is set, but teacher.kind is {teacher.kind!r}",
                    "Leave it out, or set teacher.kind to checkpoint.",
                )
    if not teacher.follows and recipe.teacher_parts not in (None, TeacherParts()):
        raise ConfigError(
            "teacher_parts",
            f"is set, but a teacher of kind {teacher.kind!r} shares and copies nothing",
            "Leave it out.",
        )
    if teacher.kind == "checkpoint":
        if teacher.model is None:
            raise ConfigError(
                "teacher.checkpoint", "is not set", "Name the run, checkpoint or exported folder of the teacher."
            )
        _check_beside(recipe, teacher.model)


def _check_beside(recipe: "Recipe", own: ModelConfig) -> None:
    parallel, student = recipe.parallel, recipe.model
    if parallel.pipeline > 1:
        raise ConfigError(
            "parallel.pipeline",
            f"is {parallel.pipeline}, but a pipeline is cut through student and teacher alike, and a teacher of kind "
            "'checkpoint' has layers of its own",
            "Set it to 1, and divide the model with parallel.tensor or ZeRO-3.",
        )
    for name, size in (("heads", own.backbone.heads), ("ffn", own.backbone.ffn)):
        if size % parallel.tensor:
            raise ConfigError(
                "parallel.tensor",
                f"{parallel.tensor} does not divide the teacher's {name} {size}",
                "Choose a number that divides those of student and teacher.",
            )
    if any(len(source.stems) > 1 for source in recipe.data.sources):
        raise ConfigError(
            "teacher.kind", "is 'checkpoint', which samples of several parts do not have yet", "Choose ema or frozen."
        )
    for name, stem in student.stems.items():
        if name not in own.stems or own.kind(name) != student.kind(name):
            there = ", ".join(own.modalities)
            raise ConfigError(
                "teacher.checkpoint",
                f"has no stem {name} of kind {student.kind(name)}; it has {there}",
                "Give an encoder of the same kind of data, or call the student's stem as it does.",
            )
        for field in _READ[student.kind(name)]:
            here, there = getattr(stem, field), getattr(own.stems[name], field)
            if here != there:
                key = "conv_layers" if field == "steps" else field
                raise ConfigError(
                    f"{student.key(name)}.{key}",
                    f"is {here!r}, and {there!r} in the teacher, which gets the same inputs",
                    "Give both the same.",
                )
        ours, its = (_positions(recipe, model, name) for model in (student, own))
        if ours != its:
            is_text = student.kind(name) == "text"
            raise ConfigError(
                f"{student.key(name)}.max_positions" if is_text else student.key(name),
                f"makes positions {ours} of a sample, the teacher {its}: there would be no target for each",
                "Give both the same." if is_text else "Give both stems the same patches or strides.",
            )


def _positions(recipe: "Recipe", model: ModelConfig, name: str) -> tuple[int, ...]:
    from d2v_scale import modalities

    return modalities.of(model, name).extent(recipe.data)[1]
