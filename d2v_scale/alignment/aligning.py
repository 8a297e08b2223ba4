"""Whether encoders put modalities together, measured with all controls: `d2v align`."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from d2v_scale import modalities
from d2v_scale.alignment import models
from d2v_scale.alignment.concepts import ConceptSet, Split, counted, open_split, shared
from d2v_scale.alignment.features import StemSamples, averaged, encoded, kind_of, lengths, raw
from d2v_scale.alignment.models import Model
from d2v_scale.alignment.pairs import FEWEST_HELD_OUT, FEWEST_TRAINING, Both, Pair, Sources, measured_pair
from d2v_scale.alignment.result import result_of
from d2v_scale.errors import DataError
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.interop.encoder_source import EncoderSource


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
    for stem, source in ((stem, source) for model in seeds for stem, source in model.stems.items()):
        for side in (split.train, split.test):  # refused before minutes are spent on the other stems
            models.tokenizer_of(source, modalities.of(source.recipe.model, stem), side, options.tokenizer)
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


_REMEDY = (
    "Give more data, or say with --concept what names a concept (key: every sample is one; shared: those that share a "
    "picture, a recording or a caption)."
)
_MORE_CONCEPTS = (
    f"Samples of a concept are averaged, as any stands for another: give data of more concepts, {FEWEST_HELD_OUT} of "
    "them held out (the joint demo has them once it is made with `pip install 'd2v_scale[joint]'`); how well a few "
    "classes are told apart `d2v probe` says."
)
_HOLD_OUT = (
    "Take what is on both sides out of the training set, and train without it: who has seen it knows the answer."
)


def _require_enough(split: Split, train: int, test: int, what: str) -> None:
    if test < FEWEST_HELD_OUT:
        both = sum(map(len, split.on_both_sides.values()))
        also = f" ({both} more are on both sides: {'; '.join(counted(split.on_both_sides))})" if both else ""
        raise DataError(
            f"{split.test.name!r} holds {test} held-out concepts{what}, by {split.test.named_by}{also}, fewer than "
            f"{FEWEST_HELD_OUT}: nothing could be told from chance.",
            _HOLD_OUT if both else _remedy(split.test, FEWEST_HELD_OUT),
        )
    if train < FEWEST_TRAINING:
        raise DataError(
            f"{split.train.name!r} holds {train} training concepts{what}, by {split.train.named_by}, fewer than "
            f"{FEWEST_TRAINING}: no map could be fitted.",
            _remedy(split.train, FEWEST_TRAINING),
        )


def _remedy(side: ConceptSet, fewest: int) -> str:
    """What helps where a side has fewer concepts: other names of them only where its samples are of so many."""
    has_samples, are_apart = len(side.places) >= fewest, len(set(shared(side.places))) >= fewest
    return _MORE_CONCEPTS if has_samples and not are_apart else _REMEDY


def _features(
    options: argparse.Namespace, seeds: Sequence[Model], split: Split
) -> tuple[Sources, dict[str, tuple[StemSamples, StemSamples]]]:
    """Every sample is decoded once for all encoders that read it alike. All of these are in memory together."""
    random = models.untrained(seeds, options.random_seeds)
    numbered = [(model, options.weights) for model in seeds] + [(model, "random") for model in random]
    encoders = [{id(one): models.built(one, weights) for one in model.sources} for model, weights in numbered]
    features: list[Both] = [{} for _ in numbered]
    found = Sources(runs=features[: len(seeds)], random=features[len(seeds) :], raw={}, lengths={}, raw_names={})
    samples: dict[str, tuple[StemSamples, StemSamples]] = {}
    for stem in seeds[0].stems:
        sources = [model.stems[stem] for model, _ in numbered]
        own = [made[id(source)] for made, source in zip(encoders, sources, strict=True)]
        for alike in _decoded_alike(sources):
            both = _samples(options, own[alike[0]], sources[alike[0]], stem, split)
            views = [encoded(own[number]) for number in alike]
            if stem not in samples:  # the first run's stem says what is raw
                samples[stem] = both
                found.raw_names[stem], of_raw = raw(both[0])
                views += [of_raw, lengths]
                train, test = averaged(both[0], views), averaged(both[1], [*views[:-2], raw(both[1])[1], lengths])
                found.raw[stem], found.lengths[stem] = (train[-2], test[-2]), (train[-1], test[-1])
            else:
                train, test = averaged(both[0], views), averaged(both[1], views)
            for place, number in enumerate(alike):
                features[number][stem] = train[place], test[place]
        print(f"{stem}: features of {len(numbered)} encoders made, {options.random_seeds} of them random", flush=True)
    return found, samples


def _decoded_alike(sources: Sequence[EncoderSource]) -> list[list[int]]:
    """The numbers of those that make the same rows of a sample, together."""
    found: list[list[int]] = []
    for number, source in enumerate(sources):
        for group in found:
            first = sources[group[0]]
            if (first.recipe.data, first.tokenizer_sha256) == (source.recipe.data, source.tokenizer_sha256):
                group.append(number)
                break
        else:
            found.append([number])
    return found


def _samples(
    options: argparse.Namespace, encoder: FrozenEncoder, source: EncoderSource, stem: str, split: Split
) -> tuple[StemSamples, StemSamples]:
    kind, both = kind_of(encoder, stem), []
    for side in (split.train, split.test):
        decoder = models.decoder_of(source, kind, side, options.tokenizer)
        both.append(StemSamples(side, kind, decoder, options.per_concept, options.batch_size))
    return both[0], both[1]
