"""How long recipes run on the same set for the same compute: FLOPs of a step, and steps for a number of FLOPs."""

import numpy as np

from d2v_scale import modalities
from d2v_scale.data.config import SAMPLE_RATE, SourceConfig
from d2v_scale.errors import DataError
from d2v_scale.planning.flops import SampleCost, cost_of
from d2v_scale.recipe import Recipe
from d2v_scale.shards.one_content import reading
from d2v_scale.shards.shard_set import find_shards


def mean_size(recipe: Recipe, shards: str) -> float | None:
    """Mean size of a training sample of `shards`: samples of audio, tokens of a row (with <s>); None where all are of
    one size. Raises DataError for shards without an index."""
    name = recipe.model.modalities[0]
    stem = modalities.of(recipe.model, name)
    if stem.fixed_grid is not None:
        return None
    found = reading(find_shards(SourceConfig(shards=shards, modality=name)), stem.content)
    if not found.indexed:
        raise DataError(f"The shards of {shards!r} have no index.", "Make one with `d2v index`.")
    length_n = np.concatenate([found.members(k).length_n for k in range(len(found.paths))])
    length_n = length_n[length_n > 0]  # 0: nothing of it is a row; -1: it could not be read
    if len(length_n) == 0:
        raise DataError(f"No sample of {shards!r} has a length.", "See `d2v inspect`.")
    return stem.mean_size(recipe.data, length_n)


def sample_cost_on(recipe: Recipe, shards: str) -> SampleCost:
    """FLOPs of a sample of mean size of `shards`; see planning/flops.py for what is counted."""
    return cost_of(recipe, recipe.model.modalities[0], mean_size(recipe, shards))


def step_flops(recipe: Recipe, shards: str) -> float:
    """FLOPs of one optimizer step of the recipe on `shards`, student and teacher."""
    size = mean_size(recipe, shards) or 1.0
    units = {"samples": 1.0, "tokens": size, "seconds": size / SAMPLE_RATE}
    return recipe.global_batch_size / units[recipe.batch_unit] * sample_cost_on(recipe, shards).total


def steps_for(recipe: Recipe, shards: str, flops: float) -> int:
    """Optimizer steps of the recipe on `shards` that come nearest to this many FLOPs; at least 1."""
    return max(1, round(flops / step_flops(recipe, shards)))


def stretched(recipe: Recipe, steps: int) -> tuple[str, ...]:
    """Arguments of train.py for a run of `steps`: warm-up, decay and the teacher's annealing keep their
    share of the run."""
    share = steps / recipe.optim.max_steps
    decay = recipe.optim.decay_from
    return (
        f"--optim.warmup_steps={int(recipe.optim.warmup_steps * share)}",
        f"--objective.ema.anneal_steps={max(1, round(recipe.objective.ema.anneal_steps * share))}",
        *(() if decay is None else (f"--optim.decay_from={int(decay * share)}",)),
    )
