"""One sentence about a run: healthy, or what to look at, by rules over its record that are stated here.

- spread: targets or predictions spread less than the recipe's health limits (fairseq: `min_target_var`,
  `min_pred_var`), or what a stem makes of a source does not vary at all (targets of silence still do, by position)
- rank: the effective rank of the targets is below 2, or a tenth of its first value (a collapse but for a few axes)
- gradient: the median norm of the last fifth is 10 times that of the second (a divergence that clipping hides)
- skipped: more than 1 % of the steps, for a value that is not finite
- loss: the last fifth is half above the lowest
- learning: k-NN finds fewer labels than with random weights, by more than two standard errors
- labels: k-NN finds no more of them than the commonest label is, within two standard errors
- masks: of a source they hide less than a twentieth of the positions (the least that was published: 15 %, BERT's)
- held out: the student explains no more of held-out targets than their mean does, and no more than before
- layers: the teacher's last has become like its first: CKA above .995, half as far from 1 as with random weights
- teacher: it does not move, is the student itself, or is farther from it than half its own norm (the EMA)
- waiting: the median share of a step that waits for data is above 15 %
- lost: more than a thousandth of the planned samples
- speed: the last fifth is slower than 70 % of the second, and lasts a minute (a machine is busy for seconds)

What was not recorded is not judged. A rule that compares parts of a run needs `LEAST` records of the figure.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2v_scale.data2vec.config import HealthConfig
from d2v_scale.tracking.names import by_stem

LEAST = 10
"""Records from which parts of a run are compared: with fewer, one of them is one step."""
_SAME = 1e-6
"""Distance from the student, in the teacher's norm, below which they are one network."""
_ALL_ALIKE = 0.002
"""Of the stem's output; rows that are equal have 0.001 (see `std_from_moments`)."""
_ERRORS = 2.0
"""Standard errors that an accuracy must have fallen by, or be above chance."""
_BY_CHANCE = 5.0
"""Samples that chance has to hit, for accuracy at chance to say something: of hundreds of classes a few samples do not.
"""
_HIDDEN = 0.05
"""Share of the positions that masks hide at least."""
_ALIKE = 0.995
"""CKA of first and last layer, above which those between them change next to nothing. Networks that have just begun
may be like that, too, as their blocks add little to what enters them, and get nearer to 1 in their first steps."""
_HARDLY = 0.01
"""Of the variance of held-out targets, by which random weights may explain more than those of the first steps."""
_A_MINUTE = 1 / 60
"""Hours."""

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Sign:
    """Something to look at."""

    name: str
    said: str


def verdict(records: Records, limits: HealthConfig | None = None) -> str:
    """The sentence: of all `records` of a run, in their order."""
    found = signs(records, limits)
    steps = sum("loss" in record for record in records)
    if steps == 0:
        return "Nothing was recorded of any step: there is nothing to judge."
    if not found and steps < LEAST:
        return f"Nothing to look at so far; {steps} recorded of its steps are too few to call it healthy."
    if not found:
        return "Healthy: none of the signs of trouble is there."
    return f"Look at {_joined([sign.name for sign in found])}: {'; '.join(sign.said for sign in found)}."


def signs(records: Records, limits: HealthConfig | None = None) -> list[Sign]:
    """What there is to look at, the gravest first."""
    given = limits or HealthConfig()
    rules = (_spread(records, given), _rank(records), _gradient(records), _skipped(records), _loss(records))
    rest = (
        _learning(records),
        _labels(records),
        _masks(records),
        _held_out(records),
        _layers(records),
        _teacher(records),
        _waiting(records),
    )
    return [sign for rule in (*rules, *rest, _lost(records), _speed(records)) for sign in rule]


def _values(records: Records, name: str) -> list[float]:
    """Of a figure; what is not finite is judged by its own rule."""
    return [float(r[name]) for r in records if name in r and math.isfinite(r[name])]


def _fifths(values: Sequence[float]) -> list[float]:
    """Medians of five equal parts; [] where there are too few values."""
    if len(values) < LEAST:
        return []
    edges = [len(values) * k // 5 for k in range(6)]
    return [statistics.median(values[a:b]) for a, b in itertools.pairwise(edges)]


def _spread(records: Records, limits: HealthConfig) -> Iterator[Sign]:
    spreads = {
        "target_std": ("the targets", limits.min_target_std),
        "prediction_std": ("the predictions", limits.min_prediction_std),
        "stem_std": ("what the stem makes", _ALL_ALIKE),
    }
    for figure, (what, limit) in spreads.items():
        names = _by_stem(records, figure)
        own = [name for source, name in names.items() if source]
        for name in own or names.values():
            last = next((float(r[name]) for r in reversed(records) if name in r), None)
            if last is not None and not last >= limit:  # so that a NaN counts
                whose = f" of {name.partition('/')[2]}" if "/" in name else ""
                alike = ": are its samples all alike?" if figure == "stem_std" else ""
                spread = "spreads" if figure == "stem_std" else "spread"
                yield Sign("a collapse", f"{what}{whose} {spread} by {last:.2g} only, less than {limit:g}{alike}")


def _rank(records: Records) -> Iterator[Sign]:
    ranks = _values(records, "target_rank")
    if len(ranks) >= LEAST:
        last = statistics.median(ranks[-len(ranks) // 5 :])
        if last < 2 or last < ranks[0] / 10:
            yield Sign("the rank of the targets", f"it is {last:.2g}, after {ranks[0]:.2g} at first")


def _gradient(records: Records) -> Iterator[Sign]:
    norms = [float(r["grad_norm"]) for r in records if "grad_norm" in r]
    fifths = _fifths([norm for norm in norms if math.isfinite(norm)])
    if fifths and fifths[-1] > 10 * fifths[1] > 0:
        yield Sign("the gradient", f"its norm is {fifths[-1]:.3g} in the end, {fifths[1]:.3g} after a fifth of the run")


def _skipped(records: Records) -> Iterator[Sign]:
    last = next((r for r in reversed(records) if "skipped_updates" in r), None)
    if last is not None and last["skipped_updates"] > 0.01 * max(1, last["step"]) and last["skipped_updates"] > 1:
        yield Sign(
            "skipped steps", f"{last['skipped_updates']:.0f} of {last['step']} steps had a value that is not finite"
        )


def _loss(records: Records) -> Iterator[Sign]:
    losses = [float(r["loss"]) for r in records if "loss" in r]
    if losses and not math.isfinite(losses[-1]):
        yield Sign("the loss", f"it is {losses[-1]}")
        return
    fifths = _fifths(losses)
    if fifths and fifths[-1] > 1.5 * min(fifths):
        yield Sign("the loss", f"it is {fifths[-1]:.3g} in the end, after {min(fifths):.3g}")


def _learning(records: Records) -> Iterator[Sign]:
    for whose, name in _by_stem(records, "knn_accuracy").items():
        found = [r for r in records if name in r]
        samples = float(found[-1].get(name.replace("accuracy", "samples", 1), 1.0))
        first, last = float(found[0][name]), float(found[-1][name])
        error = math.sqrt(max(first * (1 - first), 1e-9) / max(1.0, samples))
        if len(found) > 1 and found[0]["step"] == 0 and last < first - _ERRORS * error:
            said = f"k-NN finds {last:.1%} of the labels{_of(whose)}, {first:.1%} with random weights"
            yield Sign("what was learned", said)


def _labels(records: Records) -> Iterator[Sign]:
    for whose, name in _by_stem(records, "knn_chance").items():
        last = next(r for r in reversed(records) if name in r)
        chance, found = float(last[name]), float(last[name.replace("chance", "accuracy", 1)])
        samples = float(last.get(name.replace("chance", "samples", 1), 0.0))
        if samples * chance < _BY_CHANCE:
            continue
        if found <= chance + _ERRORS * math.sqrt(chance * (1 - chance) / max(1.0, samples)):
            said = f"k-NN finds {found:.1%} of them{_of(whose)}, the commonest is {chance:.1%}"
            yield Sign("the labels", f"{said}: are they those of these samples?")


def _masks(records: Records) -> Iterator[Sign]:
    last = {name: r[name] for r in records for name in r if name.partition("/")[0] == "masked_share"}
    for name, share in last.items():
        if share < _HIDDEN:
            whose = f" of {name.partition('/')[2]}" if "/" in name else ""
            yield Sign("the masks", f"they hide {share:.1%} of the positions{whose} (see objective.masking)")


def _held_out(records: Records) -> Iterator[Sign]:
    for whose, name in _by_stem(records, "held_out_explained").items():
        found = [float(r[name]) for r in records if name in r]
        if len(found) < 2 or len(_values(records, "loss")) < LEAST:
            continue
        # A share that still rises belongs to a run that has just begun, and so does one that has hardly moved: where a
        # decoder's first predictions are next to nothing, they are as good as the mean.
        if found[-1] <= min(0.0, max([found[0] - _HARDLY, *found[1:-1]])):
            said = f"the student explains {found[-1]:.1%} of them{_of(whose)}, no more than their mean does"
            yield Sign("the held-out targets", said)


def _layers(records: Records) -> Iterator[Sign]:
    for whose, name in _by_stem(records, "layer_likeness").items():
        found = [r for r in records if name in r]
        first, last = float(found[0][name]), float(found[-1][name])
        if found[0]["step"] == 0 and first <= _ALIKE < last and 1 - last < (1 - first) / 2:
            yield Sign("the layers", f"the last{_of(whose)} is like the first (CKA {last:.4f}, {first:.4f} at first)")


def _teacher(records: Records) -> Iterator[Sign]:
    # The first update of a warm-up from zero moves nothing, rightly.
    moved = [r for r in records if "teacher_update_norm" in r and r.get("lr", 1.0) > 0 and r.get("decay", 0.0) < 1]
    if len(moved) >= LEAST and all(r["teacher_update_norm"] == 0 for r in moved[-3:]):
        yield Sign("the teacher", "it does not move")
        return
    distances = _values(records, "student_teacher_distance_relative")
    if distances and distances[-1] > 0.5:
        yield Sign("the teacher", f"it is {distances[-1]:.2g} of its own norm away from the student")
    if len(distances) >= LEAST and max(distances[-3:]) < _SAME:
        yield Sign("the teacher", "it is the student itself (see objective.ema)")


def _waiting(records: Records) -> Iterator[Sign]:
    shares = _values(records, "data_wait_share")
    if len(shares) >= LEAST and (share := statistics.median(shares[len(shares) // 10 :])) > 0.15:
        yield Sign("the loader", f"{share:.0%} of a step waits for data (see data.workers)")


def _lost(records: Records) -> Iterator[Sign]:
    last = next((r for r in reversed(records) if "data/lost" in r), None)
    if last is not None and last["data/lost"] > 0.001 * max(1.0, float(last.get("data/planned", 0.0))):
        planned = float(last.get("data/planned", 0.0))
        yield Sign("lost samples", f"{last['data/lost']:.0f} of {planned:.0f} could not be read")


def _speed(records: Records) -> Iterator[Sign]:
    timed = [r for r in records if "samples_per_second" in r]
    fifths = _fifths(_values(timed, "samples_per_second"))
    if fifths and fifths[-1] < 0.7 * fifths[1] and timed[-1]["hours"] - timed[len(timed) * 4 // 5]["hours"] > _A_MINUTE:
        yield Sign("the speed", f"{fifths[-1]:.3g} samples a second in the end, {fifths[1]:.3g} after a fifth")


def _by_stem(records: Records, figure: str) -> dict[str, str]:
    return by_stem(dict.fromkeys(name for record in records for name in record), figure)


def _of(whose: str) -> str:
    return f" of {whose}" if whose else ""


def _joined(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
