"""Which recorded figure would have told how runs end, and which setting it would have picked."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from d2v_scale.plots.curves import series
from d2v_scale.tracking.names import by_stem

Records = Sequence[dict[str, Any]]
"""Of a run."""
_LOWER = ("loss", "held_out_loss")
"""Figures that are better where they are lower; of all others more is taken for better."""


def knn(records: Records) -> tuple[list[float], list[float]]:
    """Steps and accuracies by k-NN; of several stems the mean."""
    means = []
    for record in records:
        if accuracies := [record[name] for name in by_stem(record, "knn_accuracy").values()]:
            means.append({"step": record["step"], "knn_accuracy": sum(accuracies) / len(accuracies)})
    return series(means, "knn_accuracy")


def signs(settings: Mapping[str, Sequence[Records]], figures: Mapping[str, str]) -> list[str]:
    """Lines: how each figure (words to recorded name), read half-way and in the end, goes with the last k-NN accuracy:
    r over all runs, and where there are three settings or more the rank correlation of their means and how many points
    below the best setting the one ends that it picks. `settings`: runs by setting."""
    lines = []
    for words, name in figures.items():
        for when, share in (("half-way", 0.5), ("in the end", 1.0)):
            if share == 1.0 and name.startswith("knn_accuracy"):
                continue
            found = {label: _pairs(runs, name, share) for label, runs in settings.items()}
            line = _told({label: pairs for label, pairs in found.items() if pairs}, name.startswith(_LOWER))
            if line:
                lines.append(f"- {words} {when} and k-NN in the end: {line}")
    return lines


def _pairs(runs: Sequence[Records], name: str, share: float) -> list[tuple[float, float]]:
    """Of every run the figure at this share of its steps, and the last accuracy; of none where it is not finite."""
    pairs = []
    for records in runs:
        (steps, values), (_, accuracies) = series(records, name), knn(records)
        if steps and accuracies:
            wanted = share * max(int(record["step"]) for record in records)
            at = min(range(len(steps)), key=lambda k: abs(steps[k] - wanted))
            if isfinite(values[at]):
                pairs.append((values[at], accuracies[-1]))
    return pairs


def _told(found: Mapping[str, Sequence[tuple[float, float]]], lower: bool) -> str:
    """Empty where one of the two is the same in all runs."""
    import numpy as np

    every = [pair for pairs in found.values() for pair in pairs]
    if len(every) < 3 or np.std(every, axis=0).min() == 0:
        return ""
    said = f"r = {np.corrcoef(np.array(every).T)[0, 1]:+.2f}"
    means = {label: np.mean(pairs, axis=0) for label, pairs in found.items()}
    signs_n, last_n = np.array(list(means.values())).T
    if len(means) < 3 or min(np.std(signs_n), np.std(last_n)) == 0:
        return said
    picked = int(np.argmin(signs_n) if lower else np.argmax(signs_n))
    behind = 100 * (last_n.max() - last_n[picked])
    # Spearman's: the correlation of ranks, ties at their mean.
    ranks_n = [(x_n > x_n[:, None]).sum(0) + 0.5 * (x_n == x_n[:, None]).sum(0) for x_n in (signs_n, last_n)]
    rank = np.corrcoef(ranks_n)[0, 1]
    return f"{said}; of settings: rank correlation {rank:+.2f}, picks {list(means)[picked]}, {behind:.1f} points behind"
