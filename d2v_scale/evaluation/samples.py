"""Which samples are looked at while training, where the recipe names none with labels."""

import logging
from dataclasses import dataclass

from torch import Tensor

from d2v_scale.data.batch import Batch
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data.shard_set import find_shards
from d2v_scale.errors import DataError
from d2v_scale.recipe import Recipe

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

    `masked`: as a training step would mask them, always alike. The same on every rank. None, and a message why, where
    the training shards have no index. Raises DataError where named shards cannot be read.
    """
    shards = recipe.evaluation.held_out or recipe.evaluation.test
    try:
        found = _held_out(recipe, shards, limit, masked) if shards else _of_training(recipe, limit, masked)
        return Samples(found.read(), str(found.tokenizer) if found.tokenizer else None, shards is None)
    except DataError as error:
        if shards is not None:
            raise
        log.info("What the layers do is not measured: %s Or name some with evaluation.held_out.", error)
        return None


def _held_out(recipe: Recipe, shards: str, limit: int, masked: bool) -> LabelledSet:
    return LabelledSet(
        shards,
        recipe.model.modalities[0],
        recipe.data,
        recipe.model,
        batch_size=_batch_size(recipe, masked),
        limit=limit,
        require_labels=False,
        masking=recipe.objective.masking if masked else None,
    )


def _of_training(recipe: Recipe, limit: int, masked: bool) -> LabelledSet:
    source = recipe.data.sources[0]
    return LabelledSet(
        source.shards,
        source.modality,
        recipe.data,
        recipe.model,
        batch_size=_batch_size(recipe, masked),
        limit=min(limit, _OF_TRAINING),
        require_labels=False,
        masking=recipe.objective.masking if masked else None,
        # All of a large set would be read for its index alone.
        found=find_shards(source).one(0),
    )


def _batch_size(recipe: Recipe, masked: bool) -> int:
    return max(1, recipe.evaluation.batch_size // (recipe.objective.masking.clones if masked else 1))
