"""The result of an alignment for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from d2v_scale.alignment.scoring import MEASURES


def lines(result: Mapping[str, Any]) -> list[str]:
    """What was read, and a table for each pair."""
    data = result["data"]
    found = [
        f"{data['concepts']['held_out']} held-out and {data['concepts']['train']} training concepts, {result['seeds']} "
        f"seed{'s' * (result['seeds'] > 1)}, {result['random_encoders']} random encoders",
        *_left_out(data),
    ]
    for refused in result["refused"]:
        found.append(f"not measured, too few: {refused}")
    for name, pair in result["pairs"].items():
        found += ["", *_pair(name, pair)]
    return [*found, "", result["rule"]]


def _left_out(data: Mapping[str, Any]) -> Iterator[str]:
    """What was not used, and how much."""
    if data["one_set_split"]:
        yield "one set, split here: the encoder may have been trained on its held-out concepts"
    for side, reasons in data["left_out"].items():
        for reason, count in reasons.items():
            yield f"{side}: {count} samples left out: {reason}"
    for what, concepts in data["on_both_sides"].items():
        yield f"{len(concepts)} held-out concepts left out, {what} is on the training side: {', '.join(concepts[:3])}"
    words = {"without": "have none", "lost": "cannot be read", "beyond_per_concept": "are beyond --per_concept"}
    for stem, sides in data["samples"].items():
        for side, counts in sides.items():
            told = [f"{counts[name]} {words[name]}" for name in words if counts[name]]
            if told:
                yield f"{stem}, {side}: {counts['used']} samples; {', '.join(told)}"
    yield from data["lost"][:3]


def _pair(name: str, pair: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name}: {pair['held_out_concepts']} held-out concepts, {pair['training_concepts']} training"
    width = max(map(len, MEASURES))
    for measure, one in pair["verdicts"].items():
        layers = ",".join(map(str, sorted(set(one["layer"]))))
        chance = pair["chance"].get("R@10" if "R@10" in measure else measure, 0.0)
        shown = f"  {measure:{width}} {one['score']:z.3f}  (chance {chance:.3f}, layer {layers})  {one['verdict']}"
        yield shown + (f": {_not_above(one)}" if one["not_above"] else "")
    for note in pair["notes"]:
        yield f"  {note}"


def _not_above(one: Mapping[str, Any]) -> str:
    """How many controls a score is not above, and the one that it is furthest from being above."""
    against = one["against"]
    name = min(one["not_above"], key=lambda control: against[control]["lower_bound"])
    worst = against[name]
    return (
        f"{len(one['not_above'])} of {len(against)}, most of all {name!r} ({worst['control']:z.3f}, lower bound of the "
        f"difference {worst['lower_bound']:+z.3f})"
    )
