"""Whether encoders put modalities together, measured with all controls: `d2v align`."""

import argparse
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2v_scale.alignment import models, scoring, verdict
from d2v_scale.alignment.concepts import Split, counted, open_split
from d2v_scale.alignment.features import Means, StemSamples, encoded, kind_of, raw
from d2v_scale.alignment.measures import NEIGHBOURS
from d2v_scale.alignment.models import Model
from d2v_scale.alignment.scoring import Features, PairOfLayers, PairScores
from d2v_scale.errors import DataError
from d2v_scale.evaluation.frozen import FrozenEncoder

log = logging.getLogger(__name__)

FEWEST_HELD_OUT = 50
FEWEST_TRAINING = 20
RAW_COMPONENTS = 256
SHUFFLES = 20
RANDOM, RAW, LENGTH = "random encoder", "raw features", "length alone"
SHUFFLED, WITHIN = "shuffled pairs", "shuffled within categories"
LENGTH_REMOVED = "length removed"

Both = dict[str, tuple[Means, Means]]
"""A stem's name to its features on the training and on the held-out side."""


@dataclass(kw_only=True)
class Sources:
    """Features of every stem, of all that is compared."""

    runs: list[Both]
    """By seed."""
    random: list[Both]
    raw: Both
    lengths: Both
    raw_names: dict[str, str]


@dataclass(kw_only=True)
class Pair:
    """One pair of stems, on the concepts that have both: what is measured, and what is needed to look at it."""

    x: str
    y: str
    train_concepts: list[str]
    test_concepts: list[str]
    train_categories: list[str | None]
    test_categories: list[str | None]
    runs: list[PairScores]
    random: list[PairScores]
    values: dict[str, Tensor]
    """By measure: (S, N) of the runs."""
    controls: dict[str, dict[str, Tensor]]
    """By control and measure: (R, N)."""
    without_length: dict[str, Tensor]
    """As `values`, length regressed out; empty where it does not vary."""
    features: list[Features]
    """Of the first run, by layer."""
    notes: list[str] = field(default_factory=list)


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
    result = _result(options, seeds, split, samples, pairs, measured.raw_names, too_few)
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


def measured_pair(found: Sources, split: Split, x: str, y: str) -> Pair | str:
    """A pair of stems, measured; what to say where there are too few concepts."""
    first = found.runs[0]
    train_n, test_n = ((first[x][side].present_n & first[y][side].present_n).nonzero()[:, 0] for side in (0, 1))
    if len(test_n) < FEWEST_HELD_OUT or len(train_n) < FEWEST_TRAINING:
        return f"{x} and {y} have {len(test_n)} held-out and {len(train_n)} training concepts"

    def layers(one: Both, most: int | None = None) -> list[Features]:
        depths = [len(one[stem][0].layers_lnd) for stem in (x, y)]
        made = [
            Features(
                train_x_nd=one[x][0].layers_lnd[i, train_n],
                train_y_ne=one[y][0].layers_lnd[j, train_n],
                test_x_nd=one[x][1].layers_lnd[i, test_n],
                test_y_ne=one[y][1].layers_lnd[j, test_n],
            )
            for i, j in scoring.matched(*depths)
        ]
        return made if most is None else [each.principal(most) for each in made]

    lengths = layers(found.lengths)[0]
    run_features, random_features = [layers(one) for one in found.runs], [layers(one) for one in found.random]
    train, test = (_named(side, rows) for side, rows in ((split.train, train_n), (split.test, test_n)))
    pair = Pair(
        x=x,
        y=y,
        train_concepts=[name for name, _ in train],
        test_concepts=[name for name, _ in test],
        train_categories=[category for _, category in train],
        test_categories=[category for _, category in test],
        runs=[],
        random=[],
        values={},
        controls={},
        without_length={},
        features=run_features[0],
    )
    generator = torch.Generator().manual_seed(0)
    orders = [scoring.any_order(len(train_n), len(test_n), generator) for _ in range(SHUFFLES)]
    pair.runs, pair.values, pair.controls[SHUFFLED], within = _measured(run_features, orders, pair, generator)
    if within:
        pair.controls[WITHIN] = within
    pair.random, pair.controls[RANDOM], _, _ = _measured(random_features, [], pair, generator)
    for name, features in ((RAW, layers(found.raw, RAW_COMPONENTS)), (LENGTH, [lengths])):
        _, pair.controls[name], _, _ = _measured([features], [], pair, generator)
    if bool((lengths.train_x_nd.std(dim=0) > 0).any() | (lengths.train_y_ne.std(dim=0) > 0).any()):
        without = [[one.without(lengths) for one in each] for each in run_features]
        plain = [[one.without(lengths) for one in each] for each in random_features]
        _, pair.without_length, shuffles, _ = _measured(without, orders, pair, generator)
        pair.controls[f"{LENGTH_REMOVED}, {SHUFFLED}"] = shuffles
        _, pair.controls[f"{LENGTH_REMOVED}, {RANDOM}"], _, _ = _measured(plain, [], pair, generator)
    else:
        pair.notes.append("length does not vary: it is not removed")
    return pair


def _named(side: Any, rows: Tensor) -> list[tuple[str, str | None]]:
    """Concepts and their categories, of some of a set's concepts."""
    category = {place.concept: place.category for place in reversed(side.places)}
    concepts = side.concepts
    return [(concepts[row], category[concepts[row]]) for row in rows.tolist()]


def _measured(
    features: Sequence[Sequence[Features]], orders: Sequence[scoring.Order], pair: Pair, generator: torch.Generator
) -> tuple[list[PairScores], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Several models: their scores, the values of the layers they choose, and these with pairs shuffled (a mean over
    models), at all and within categories. The last two are empty without `orders`, the last one where there are no
    categories."""
    scores, any_pairs, within_pairs = [], [], []
    within: list[scoring.Order] = []
    if orders and scoring.large_categories(pair.test_categories):
        within = [scoring.order_within(pair.train_categories, pair.test_categories, generator) for _ in range(SHUFFLES)]
    for each in features:
        layers = [PairOfLayers(one) for one in each]
        scores.append(scoring.scored(layers))
        if orders:
            any_pairs.append(scoring.shuffled(layers, scores[-1].chosen, orders))
        if within:
            within_pairs.append(scoring.shuffled(layers, scores[-1].chosen, within))
    names = list(scores[0].chosen)
    values = {name: torch.stack([one.values(name) for one in scores]) for name in names}
    means = [
        {name: torch.stack([one[name] for one in several]).mean(dim=0) for name in names} if several else {}
        for several in (any_pairs, within_pairs)
    ]
    return scores, values, means[0], means[1]


def compared(pairs: Sequence[Pair]) -> tuple[int, dict[int, dict[str, dict[str, verdict.Difference]]]]:
    """How many comparisons there are, and each one: number of the pair, measure, control."""
    wanted = [
        (number, measure, control)
        for number, pair in enumerate(pairs)
        for measure in pair.values
        for control, values in pair.controls.items()
        if measure in values
    ]
    found: dict[int, dict[str, dict[str, verdict.Difference]]] = {number: {} for number in range(len(pairs))}
    for number, measure, control in wanted:
        pair = pairs[number]
        runs = (pair.without_length if control.startswith(LENGTH_REMOVED) else pair.values)[measure]
        one = verdict.compared(runs, pair.controls[control][measure], len(wanted))
        found[number].setdefault(measure, {})[control] = one
    return len(wanted), found


def _result(
    options: argparse.Namespace,
    seeds: Sequence[Model],
    split: Split,
    samples: Mapping[str, tuple[StemSamples, StemSamples]],
    pairs: Sequence[Pair],
    raw_names: Mapping[str, str],
    too_few: Sequence[str],
) -> dict[str, Any]:
    comparisons, differences = compared(pairs)
    over = "runs (seeds) and concepts (bootstrap)" if len(seeds) > 1 else "concepts (bootstrap), as there is one run"
    return {
        "runs": [
            {
                "checkpoint": str(source.path),
                "step": source.step,
                "seed": source.recipe.seed,
                "stems": source.recipe.model.modalities,
            }
            for model in seeds
            for source in model.sources
        ],
        "weights": options.weights,
        "seeds": len(seeds),
        "random_encoders": options.random_seeds,
        "rule": (
            f"{verdict.ABOVE}: the lower {verdict.CONFIDENCE:.0%} bound of the difference to every control is above 0, "
            f"over {over}, corrected for {comparisons} comparisons (Bonferroni)"
        ),
        "comparisons": comparisons,
        "features": "mean over valid positions, then over the samples of a concept; equal samples count once",
        "raw_features": dict(raw_names),
        "data": _counts(split, samples),
        "refused": list(too_few),
        "pairs": {f"{pair.x} - {pair.y}": _shown(pair, differences[n]) for n, pair in enumerate(pairs)},
    }


def _counts(split: Split, samples: Mapping[str, tuple[StemSamples, StemSamples]]) -> dict[str, Any]:
    sides = {"train": split.train, "held_out": split.test}
    return {
        "train": split.train.name,
        "held_out": split.test.name,
        "one_set_split": split.same_shards,
        "concepts": {name: len(side.concepts) for name, side in sides.items()},
        "left_out": {name: {why: len(keys) for why, keys in side.left_out.items()} for name, side in sides.items()},
        "on_both_sides": dict(split.on_both_sides),
        "samples": {
            stem: {
                name: {
                    "used": one.read.used,
                    "equal_to_another": one.read.same,
                    "beyond_per_concept": one.read.beyond,
                    "without": one.read.missing,
                    "lost": len(one.read.lost),
                }
                for name, one in zip(sides, both, strict=True)
            }
            for stem, both in samples.items()
        },
        "lost": [line for both in samples.values() for one in both for line in one.read.lost[:3]],
    }


def _shown(pair: Pair, differences: Mapping[str, Mapping[str, verdict.Difference]]) -> dict[str, Any]:
    """A pair as JSON."""
    held_out = len(pair.test_concepts)
    verdicts = {
        measure: {
            "verdict": verdict.ABOVE if all(one.above for one in against.values()) else verdict.NOT_ABOVE,
            "score": float(pair.values[measure].mean()),
            "by_seed": pair.values[measure].mean(dim=1).tolist(),
            "layer": [scores.chosen[measure] + 1 for scores in pair.runs],
            "not_above": [control for control, one in against.items() if not one.above],
            "against": {
                control: {
                    "score": one.score,
                    "control": one.control,
                    "difference": one.difference,
                    "lower_bound": one.lower_bound,
                    "above": one.above,
                }
                for control, one in against.items()
            },
        }
        for measure, against in differences.items()
    }
    return {
        "x": pair.x,
        "y": pair.y,
        "held_out_concepts": held_out,
        "training_concepts": len(pair.train_concepts),
        "categories": scoring.large_categories(pair.test_categories),
        "chance": {f"R@{k}": min(1.0, k / held_out) for k in scoring.AT}
        | {scoring.MUTUAL: min(NEIGHBOURS, held_out - 1) / (held_out - 1), scoring.CKA: 0.0},
        "notes": pair.notes + ([] if WITHIN in pair.controls else [_no_categories(pair)]),
        "verdict": verdicts[scoring.MAPPED]["verdict"],
        "verdicts": verdicts,
        "layers": {"runs": _by_layer(pair.runs), RANDOM: _by_layer(pair.random)},
    }


def _no_categories(pair: Pair) -> str:
    if not any(pair.test_categories):
        return "no categories: pairs are not shuffled within them"
    return f"no category has {scoring.SMALLEST_CATEGORY} held-out concepts: pairs are not shuffled within them"


def _by_layer(several: Sequence[PairScores]) -> list[dict[str, Any]]:
    """Means over models."""

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    found = []
    for number, layers in enumerate(zip(*(one.layers for one in several), strict=True)):
        spaces = layers[0].retrieval
        found.append(
            {
                "layer": number + 1,
                **{measure: mean([layer.score(measure) for layer in layers]) for measure in scoring.MEASURES},
                "modality gap": mean([layer.gap for layer in layers]),
                "retrieval": {
                    space: {
                        k: {way: mean([layer.retrieval[space][k][way] for layer in layers]) for way in ways}
                        for k, ways in at.items()
                    }
                    for space, at in spaces.items()
                },
            }
        )
    return found


def scores_of(result: Mapping[str, Any]) -> dict[str, float]:
    """For the record: each verdict's score, and 1 or 0 for what it is."""
    found = {}
    for name, pair in result["pairs"].items():
        short = name.replace(" - ", "-")
        for measure, one in pair["verdicts"].items():
            key = f"align/{short}/{measure.replace('@', '')}"
            found[key] = one["score"]
            found[f"{key}/above_controls"] = float(one["verdict"] == verdict.ABOVE)
    return found
