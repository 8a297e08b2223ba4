"""Whether encoders put modalities together, measured with all controls: `d2v align`."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2v_scale.alignment import models
from d2v_scale.alignment.concepts import Split, counted, open_split
from d2v_scale.alignment.features import StemSamples, encoded, kind_of, raw
from d2v_scale.alignment.models import Model
from d2v_scale.alignment.pairs import FEWEST_HELD_OUT, FEWEST_TRAINING, Both, Pair, Sources, measured_pair
from d2v_scale.alignment.result import result_of
from d2v_scale.errors import DataError
from d2v_scale.evaluation.frozen import FrozenEncoder


@dataclass(kw_only=True)
class Alignment:
    """All of it."""

    result: dict[str, Any]
    """What is written as JSON."""
    pairs: list[Pair]
    split: Split
    samples: dict[str, StemSamples]
    """Held-out ones by stem, to be looked at."""
    models: list[Model]


def align(options: argparse.Namespace) -> Alignment:
    """Measure every pair of stems. Raises UserError where there is too little to say anything."""
    sources = models.opened(options.runs, options.weights)
    seeds = models.models_of(sources)
    contents = models.contents_of(seeds)
    split = open_split(options.data, options.test, options.held_out, contents, options.concept, options.category)
    _require_enough(split, len(split.train.concepts), len(split.test.concepts), "")
    measured, samples = _features(options, seeds, split)
    pairs, too_few = [], []
    for x, y in itertools.combinations(seeds[0].stems, 2):
        found = measured_pair(measured, split, x, y)
        if isinstance(found, str):
            too_few.append(found)
        else:
            pairs.append(found)
    if not pairs:
        raise DataError(f"No pair of modalities has enough concepts: {'; '.join(too_few)}.", _REMEDY)
    result = result_of(options, seeds, split, samples, pairs, measured.raw_names, too_few)
    return Alignment(
        result=result,
        pairs=pairs,
        split=split,
        samples={stem: held_out for stem, (_, held_out) in samples.items()},
        models=seeds,
    )


_REMEDY = "Give more data, or say with --concept what names a concept (key: every sample is one)."


def _require_enough(split: Split, train: int, test: int, what: str) -> None:
    if test < FEWEST_HELD_OUT:
        both = sum(map(len, split.on_both_sides.values()))
        also = f" ({both} more are on both sides: {'; '.join(counted(split.on_both_sides))})" if both else ""
        raise DataError(
            f"{split.test.name!r} holds {test} held-out concepts{what}{also}, fewer than {FEWEST_HELD_OUT}: nothing "
            "could be told from chance.",
            _REMEDY,
        )
    if train < FEWEST_TRAINING:
        raise DataError(
            f"{split.train.name!r} holds {train} training concepts{what}, fewer than {FEWEST_TRAINING}: no map could "
            "be fitted.",
            _REMEDY,
        )


def _features(
    options: argparse.Namespace, seeds: Sequence[Model], split: Split
) -> tuple[Sources, dict[str, tuple[StemSamples, StemSamples]]]:
    """Everything is read once for each encoder, and once more for the controls without one."""
    samples: dict[str, tuple[StemSamples, StemSamples]] = {}
    found = Sources(runs=[], random=[], raw={}, lengths={}, raw_names={})
    numbered = [(model, options.weights, found.runs) for model in seeds]
    numbered += [(model, "random", found.random) for model in models.untrained(seeds, options.random_seeds)]
    for model, weights, target in numbered:
        features: Both = {}
        for source in model.sources:
            encoder = models.built(source, weights)
            for stem in source.recipe.model.modalities:
                both = _samples(options, encoder, model, stem, split)
                if stem not in samples:
                    samples[stem] = both
                features[stem] = encoded(encoder, both[0]), encoded(encoder, both[1])
                if samples[stem] is not both:
                    continue
                # Decoded alike for all: the first run's stem says what is raw.
                name, *train = raw(both[0])
                _, *test = raw(both[1])
                found.raw_names[stem] = name
                found.raw[stem], found.lengths[stem] = (train[0], test[0]), (train[1], test[1])
        target.append(features)
        print(f"{'random ' if target is found.random else ''}encoder {len(target)}: features made", flush=True)
    return found, samples


def _samples(
    options: argparse.Namespace, encoder: FrozenEncoder, model: Model, stem: str, split: Split
) -> tuple[StemSamples, StemSamples]:
    kind, source = kind_of(encoder, stem), model.stems[stem]
    both = []
    for side in (split.train, split.test):
        decoder = models.decoder_of(source, kind, side, options.tokenizer)
        both.append(StemSamples(side, kind, decoder, options.per_concept, options.batch_size))
    return both[0], both[1]
