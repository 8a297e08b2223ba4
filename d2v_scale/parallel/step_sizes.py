"""Whether a step of a recipe can be divided among ranks and micro-batches."""

from typing import TYPE_CHECKING

from d2v_scale import modalities
from d2v_scale.data.config import SourceConfig
from d2v_scale.errors import ConfigError
from d2v_scale.model.stem_config import parts_of

if TYPE_CHECKING:
    from d2v_scale.recipe import Recipe


def check_step(recipe: "Recipe", name: str, replicas: int) -> None:
    """Raises ConfigError where a step of the stem `name` is too small for `replicas` data-parallel ranks, counted in a
    unit it does not have, or divided otherwise than its loss needs."""
    own = [(f"data.sources.{k}.", s) for k, s in enumerate(recipe.data.sources) if s.modality == name]
    for prefix, source in own or [("", SourceConfig())]:
        size, unit = source.batch_size or recipe.global_batch_size, source.batch_unit or recipe.batch_unit
        of_source = f" of {source.name or name}" if len(recipe.data.sources) > 1 else ""
        size_key = "global_batch_size" if source.batch_size is None else f"{prefix}batch_size"
        if unit == "samples" and size < replicas * recipe.rounds:
            raise ConfigError(
                size_key,
                f"{size} samples{of_source} are fewer than {replicas} data-parallel ranks x {recipe.rounds} "
                "micro-batches",
                "Raise it, lower accumulation, or start fewer processes.",
            )
        if unit not in ("samples", modalities.of(recipe.model, name).unit):
            fits = [kind for kind in modalities.KINDS if modalities.class_of(kind).unit == unit]
            raise ConfigError(
                "batch_unit" if source.batch_unit is None else f"{prefix}batch_unit",
                f"is {unit!r}, which samples of {name} are not counted in",
                f"It fits {' or '.join(fits)}; each of data.sources may have its own batch_unit.",
            )
        if recipe.task is None:
            _check_koleo(recipe, name, replicas, size, unit)


def _check_koleo(recipe: "Recipe", name: str, replicas: int, size: int, unit: str) -> None:
    """Raises ConfigError where micro-batches do not hold whole groups of samples that are compared."""
    for stem in parts_of(name):
        loss = recipe.objective.of(stem).loss
        if loss.koleo_weight == 0:
            continue
        key = recipe.objective.key(stem, "objective.loss.koleo_group")
        if loss.koleo_group < 2:
            raise ConfigError(key, f"is {loss.koleo_group}", "Give 2 or more: samples are compared with others.")
        if unit != "samples":
            raise ConfigError(
                recipe.objective.key(stem, "objective.loss.koleo_weight"),
                f"is {loss.koleo_weight:g}, but micro-batches of {name} are counted in {unit} and hold any number of "
                "samples",
                "Set it to 0, or batch_unit to samples.",
            )
        shares = replicas * recipe.rounds
        if size % (shares * loss.koleo_group):
            raise ConfigError(
                key,
                f"is {loss.koleo_group}, but {size} samples in {shares} micro-batches are no multiple of it each",
                f"Give a divisor of {size / shares:g} samples, or another global_batch_size."
                if size % shares == 0
                else f"Give a global_batch_size that is a multiple of {shares} x koleo_group.",
            )
