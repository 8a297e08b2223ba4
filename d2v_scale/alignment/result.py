"""What an alignment comes to, as JSON holds it: verdicts, scores by layer, counts of what was read."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from d2v_scale.alignment import scoring, verdict
from d2v_scale.alignment.concepts import Split
from d2v_scale.alignment.features import StemSamples
from d2v_scale.alignment.measures import NEIGHBOURS
from d2v_scale.alignment.models import Model
from d2v_scale.alignment.pairs import LENGTH_REMOVED, RANDOM, WITHIN, Pair
from d2v_scale.alignment.scoring import PairScores


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


def result_of(
    options: argparse.Namespace,
    seeds: Sequence[Model],
    split: Split,
    samples: Mapping[str, tuple[StemSamples, StemSamples]],
    pairs: Sequence[Pair],
    raw_names: Mapping[str, str],
    too_few: Sequence[str],
) -> dict[str, Any]:
    comparisons, differences = compared(pairs)
    whose = {source.weights for model in seeds for source in model.sources}
    over = "runs (seeds) and concepts (bootstrap)" if len(seeds) > 1 else "concepts (bootstrap), as there is one run"
    return {
        "runs": [
            {
                "checkpoint": str(source.path),
                "weights": "random" if options.weights == "random" else source.weights,
                "step": source.step,
                "seed": source.recipe.seed,
                "stems": source.recipe.model.modalities,
            }
            for model in seeds
            for source in model.sources
        ],
        "weights": "random" if options.weights == "random" else " and ".join(sorted(whose)),
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
            key = f"{short}/{measure.replace('@', '')}"
            found[f"align/{key}"] = one["score"]
            # Not below the score's own name: a store of files holds either a file or a folder of a name.
            found[f"align/above_controls/{key}"] = float(one["verdict"] == verdict.ABOVE)
    return found
