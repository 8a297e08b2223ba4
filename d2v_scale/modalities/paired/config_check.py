"""What a recipe may not say of paired samples."""

from d2v_scale.data.config import DataConfig
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.errors import ConfigError
from d2v_scale.model.config import ModelConfig


def check_pairs(model: ModelConfig, objective: ObjectiveConfig, data: DataConfig, *, tuned: bool) -> None:
    """Raises ConfigError for paired samples that cannot be one sequence. `tuned`: the recipe fine-tunes."""
    for k, source in enumerate(data.sources):
        if len(source.stems) == 1:
            continue
        key = f"data.sources.{k}.modality"
        if tuned:
            shown = f"is {source.modality!r}, but labels are read beside samples of one stem"
            raise ConfigError(key, shown, "Name one stem.")
        for name in source.stems:
            if not model.stems[name].paired:
                own = f"{model.key(name)}.paired"
                raise ConfigError(own, f"is not true, but {key} names {name} among others", "Leave it out.")
        clones = {name: objective.of(name).masking.clones for name in source.stems}
        if len(set(clones.values())) > 1:
            said = ", ".join(f"{count} of {name}" for name, count in clones.items())
            shown = f"differ within data.sources.{k} ({said}), whose parts are masked row by row"
            raise ConfigError("objective.masking.clones", shown, "Give these stems as many.")
        for name in ("equalize_masks", "text_teacher_masked_only"):
            if getattr(objective.compat, name):
                shown = f"repeats published runs, and data.sources.{k} has paired samples, of which there are none"
                raise ConfigError(f"objective.compat.{name}", shown, "Leave it out.")
