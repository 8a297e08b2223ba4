"""What pretraining gains over the random start of the same seed: means, and the lower end of the 95 % interval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student_t

MEASURES = {"knn": "k-NN", "linear": "linear"}


def lower_bound(gains: Sequence[float]) -> float:
    """Of the mean of these differences, each of one seed: the lower end of the two-sided 95 % interval of Student's t.
    Needs two."""
    count = len(gains)
    assert count > 1
    return float(np.mean(gains) - student_t.ppf(0.975, count - 1) * np.std(gains, ddof=1) / np.sqrt(count))


def gains_of(rows: Sequence[dict[str, Any]], measure: str) -> list[float]:
    """Of each seed, in percent: pretrained minus its random start."""
    return [100 * (row[measure] - row[f"random_{measure}"]) for row in rows]


def table(rows: dict[str, list[dict[str, Any]]], raw: dict[str, dict[str, Any]], titles: dict[str, str]) -> str:
    """Markdown, percent: of each arm its rows, one a seed, and what its samples say without a model."""
    lines = [
        "| set | measure | raw | random start | pretrained | gain | 95 %, from | above 0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in rows.items():
        for measure, called in MEASURES.items():
            cells = [titles[name], called, _raw(raw[name], measure)]
            cells += [_spread([100 * row[f"random_{measure}"] for row in found])]
            cells += [_spread([100 * row[measure] for row in found])]
            lines.append("| " + " | ".join([*cells, *_gain(gains_of(found, measure))]) + " |")
    return "\n".join(lines) + "\n"


def comparison(rows: dict[str, list[dict[str, Any]]], name: str, other: str, titles: dict[str, str]) -> str:
    """One line: an arm against another of the same seeds."""
    found = []
    for measure, called in MEASURES.items():
        of_other = {row["seed"]: row[measure] for row in rows[other]}
        differences = [100 * (row[measure] - of_other[row["seed"]]) for row in rows[name] if row["seed"] in of_other]
        found.append(_against(called, differences))
    return f"- {titles[name]} against {titles[other]}, paired by seed: {'; '.join(found)}.\n"


def against_fixed(rows: Sequence[dict[str, Any]], fixed: dict[str, float], title: str, what: str) -> str:
    """One line: an arm against what has no seed."""
    found = [
        _against(called, [100 * (row[measure] - fixed[measure]) for row in rows])
        for measure, called in MEASURES.items()
    ]
    values = ", ".join(f"{called} {100 * fixed[measure]:.1f}" for measure, called in MEASURES.items())
    return f"- {title} against {what} ({values}): {'; '.join(found)}.\n"


def _against(called: str, differences: Sequence[float]) -> str:
    mean, bound, verdict = _gain(differences)
    return f"{called} {mean}, 95 % from {bound} (above 0: {verdict})"


def _gain(gains: Sequence[float]) -> list[str]:
    if len(gains) < 2:
        return [f"{gains[0]:+.1f}" if gains else "", "", "one seed"]
    bound = lower_bound(gains)
    return [f"{np.mean(gains):+.1f}", f"{bound:+.1f}", "yes" if bound > 0 else "**no**"]


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def _raw(found: dict[str, Any], measure: str) -> str:
    return f"{100 * found[measure]:.1f}"
