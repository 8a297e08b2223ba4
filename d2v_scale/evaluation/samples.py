"""Which samples are looked at while training, where the recipe names none with labels."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.errors import DataError
from d2v_scale.recipe import Recipe
from d2v_scale.shards.shard_set import find_shards

log = logging.getLogger(__name__)

_OF_TRAINING = 16


@dataclass(frozen=True)
class Samples:
    """Batches with labels (-1: none)."""

    batches: list[tuple[Batch, Tensor]]
    tokenizer: str | None
    """Sentencepiece model, for text."""
    trained_on: bool


def samples_without_labels(recipe: Recipe, limit: int, *, masked: bool) -> Samples | None:
    """Up to `limit` samples of the recipe's held-out shards, or else a few of the first training shard.

    `masked`: as a training step would mask them, always alike. None, and a message why, where training shards cannot be
    read like this on every rank (no index, say). Raises DataError where named shards cannot. Collective: all ranks must
    call; all get the same.
    """
    shards = recipe.evaluation.held_out or recipe.evaluation.test
    found, problem = None, None
    try:
        read = _set_of(recipe, shards, limit, masked)
        found = Samples(read.read(), str(read.tokenizer) if read.tokenizer else None, shards is None)
    except DataError as error:
        problem = error
    batches = [] if found is None else found.batches
    try:
        require_same(batches, shards or recipe.data.sources[0].shards)
    except DataError as error:
        problem = problem or error
    if problem is not None and shards is not None:
        raise problem
    if problem is not None:
        log.info("No samples to look at while training: %s Or name some with evaluation.held_out.", problem)
        return None
    return found


def require_same(batches: Sequence[tuple[Batch, Tensor]], shards: str) -> None:
    """Raises DataError, on every rank, unless all have read the same samples. Collective: all ranks must call."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = [batch.keys for batch, _ in batches]
    everyone: list[list[tuple[str, ...]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    others = [rank for rank, theirs in enumerate(everyone) if theirs != everyone[0]]
    if others:
        raise DataError(
            f"Ranks 0 and {others[0]} read different samples of {shards!r}.",
            "Their logs say what was lost; every node needs the whole set.",
        )


def _set_of(recipe: Recipe, shards: str | None, limit: int, masked: bool) -> LabelledSet:
    """`shards`: the named ones; None: the first of training alone, as a large set would all be read for its index."""
    first = recipe.data.sources[0]
    if not shards and len(first.stems) > 1:
        raise DataError("The first source has paired samples, which are not looked at without being named.")
    modality = recipe.model.modalities[0] if shards else first.modality
    masks = recipe.masking_of(modality)
    clones = masks.clones if masked else 1
    return LabelledSet(
        shards or first.shards,
        modality,
        recipe.data,
        recipe.model,
        batch_size=max(1, recipe.evaluation.batch_size // clones),
        limit=limit if shards else min(limit, _OF_TRAINING),
        require_labels=False,
        masking=masks if masked else None,
        compat=recipe.objective.compat,
        min_seconds=modalities.of(recipe.model, modality).shortest_seconds(recipe.data),
        found=None if shards else find_shards(first).one(0),
    )
