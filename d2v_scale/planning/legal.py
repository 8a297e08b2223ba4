"""Which ways to run a recipe are legal: training asks before it starts, the planner before it recommends one."""

from typing import Any, Literal

from d2v_scale.errors import ConfigError
from d2v_scale.parallel import ds_config
from d2v_scale.planning.stages import stage_blocks
from d2v_scale.recipe import Recipe


def usual_precision(device: str) -> Literal["fp32", "bf16"]:
    """What `precision: auto` stands for on this type of device where nothing was measured."""
    return "bf16" if device == "cuda" else "fp32"


def deepspeed_config(
    recipe: Recipe, raw: dict[str, Any], world_size: int, *, auto: Literal["fp32", "bf16"]
) -> dict[str, Any]:
    """DeepSpeed's configuration of a recipe on `world_size` processes. `raw`: the DeepSpeed JSON. `auto`: what
    `precision: auto` stands for.

    Raises ConfigError for what contradicts itself or cannot work. Pure: forms no process group, allocates nothing.
    """
    recipe.check(world_size)
    numbers = ds_config.RecipeNumbers(
        precision=recipe.resolved_precision(auto),
        accumulation=recipe.accumulation,
        clip=recipe.optim.clip,
        compile=recipe.model.compile,
        stems=len(recipe.model.modalities),
        optim=recipe.optim,
        global_batch_size=recipe.samples_of_step,
    )
    config = ds_config.resolve(raw, numbers, recipe.parallel, world_size)
    if recipe.parallel.pipeline > 1:
        _check_pipeline(recipe)
    return config


def _check_pipeline(recipe: Recipe) -> None:
    if recipe.task is not None:
        raise ConfigError("parallel.pipeline", f"is {recipe.parallel.pipeline}", "Fine-tuning divides the batch only.")
    if recipe.model.backbone.width % 2:
        raise ConfigError("model.backbone.width", "is odd, which a pipeline cannot send in bf16", "Give an even width.")
    stage_blocks(recipe, recipe.parallel.pipeline, recipe.parallel.tensor)
