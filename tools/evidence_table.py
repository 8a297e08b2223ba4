"""The results of tools/evidence.py for people: tables, and how early the record tells how a run will end."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from evidence_pairs_table import comparison
from evidence_sets import LAYOUTS

from d2v_scale import modalities
from d2v_scale.model.stem_config import Kind

ROWS = {
    "random 1.0": "random init, 1.0",
    "random 2.0": "random init, 2.0",
    "supervised": "labels only, from scratch",
    "1.0": "data2vec 1.0",
    "2.0": "data2vec 2.0",
}
SEEDS_OF_COMPUTE = 3
"""Without which an arm over compute is not finished,"""
_LONG, _SEEDS_OF_LONG = 64, 1
"""but for those of so much compute."""
_MEASURES = {
    "knn": "k-NN",
    "linear": "linear",
    "finetuned_1": "1 % of labels",
    "finetuned_10": "10 % of labels",
}
_WITHOUT = {"knn": "random_knn", "linear": "random_linear", "finetuned_1": "scratch_1", "finetuned_10": "scratch_10"}
"""What each is to be compared with."""
_SIGNS = {"knn_accuracy": "k-NN", "held_out_loss": "held-out loss", "held_out_explained": "held-out share explained"}


def table(
    results: list[dict[str, Any]], names: dict[Kind, str], budgets: dict[str, float], samples: dict[str, str]
) -> str:
    """A Markdown table: mean and standard deviation over seeds, in percent. `samples`: what the sets are."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        groups[result["modality"], result["row"]].append(result)
    lines = [
        "| set | features | steps | k-NN | linear | target std | target rank |",
        "|---|---|---|---|---|---|---|",
    ]
    notes = []
    for modality, name in names.items():
        for row, label in {"raw": modalities.class_of(modality).raw_name, **ROWS}.items():
            found = groups[modality, row]
            cells = [
                f"{name} ({modality})",
                label,
                str(found[0]["steps"]) if row in ("supervised", "1.0", "2.0") else "",
            ]
            linear = "accuracy" if row == "supervised" else "linear"
            cells += [_percent(found, "knn"), _percent(found, linear)]
            cells += [_mean(found, "target_std", 2), _mean(found, "target_rank", 1)]
            lines.append("| " + " | ".join(cells) + " |")
        largest = _percent(groups[modality, "raw"], "largest_class")
        notes.append(
            f"- {name}: {samples[modality]}; the most frequent class is {largest} % of the test samples. "
            f"{budgets[modality]:.2e} FLOPs a run. {_catching_up(groups, modality)}"
        )
    return "\n".join([*lines, "", *notes, ""])


def _percent(results: list[dict[str, Any]], key: str) -> str:
    values = [100 * result[key] for result in results if key in result]
    if not values:
        return ""
    return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def _mean(results: list[dict[str, Any]], key: str, digits: int) -> str:
    values = [result[key] for result in results if key in result]
    return f"{np.mean(values):.{digits}f}" if values else ""


def _catching_up(groups: dict[tuple[str, str], list[dict[str, Any]]], modality: str) -> str:
    """At which share of the compute 2.0's k-NN, as measured during training, first was 1.0's last."""
    curves = {
        version: np.mean(
            [[point["knn_accuracy"] for point in run["curve"]] for run in groups[modality, version]], axis=0
        )
        for version in ("1.0", "2.0")
    }
    if curves["1.0"][-1] <= curves["1.0"][0]:
        return "1.0's k-NN has not risen above that of its random start."
    steps = [point["step"] for point in groups[modality, "2.0"][0]["curve"]]
    reached = np.flatnonzero(curves["2.0"] >= curves["1.0"][-1])
    if len(reached) == 0:
        return "2.0 does not reach 1.0's k-NN in the same compute."
    return f"2.0 reaches 1.0's last k-NN at {steps[reached[0]] / steps[-1]:.0%} of the compute."


def early_warning(results: list[dict[str, Any]]) -> str:
    """How what is recorded half-way correlates with the linear probe in the end, over all runs of a modality.

    Within a version, since losses of 1.0 and 2.0 are of different targets: the mean of each version is subtracted.
    """
    lines = [
        "| half-way, in the record | " + " | ".join(LAYOUTS) + " |",
        "|---|" + "---|" * len(LAYOUTS),
    ]
    runs = [result for result in results if result.get("curve")]
    for sign, label in _SIGNS.items():
        cells = []
        for modality in LAYOUTS:
            x, y = [], []
            for version in ("1.0", "2.0"):
                chosen = [run for run in runs if run["modality"] == modality and run["row"] == version]
                early = np.array([_half_way(run["curve"], sign) for run in chosen])
                late = np.array([run["linear"] for run in chosen])
                x += list(early - early.mean()) if len(early) else []
                y += list(late - late.mean()) if len(late) else []
            usable = len(x) > 2 and np.std(x) > 0 and np.std(y) > 0 and not np.isnan(x).any()
            cells.append(f"{np.corrcoef(x, y)[0, 1]:+.2f} (n {len(x)})" if usable else "")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _half_way(curve: list[dict[str, float]], key: str) -> float:
    middle = curve[-1]["step"] / 2
    point = min(curve, key=lambda point: abs(point["step"] - middle))
    return point.get(key, float("nan"))


def finished_arms(rows: Path) -> dict[str, dict[tuple[str, float], list[dict[str, Any]]]]:
    """Rows of `evidence.py --compute` by set, then by recipe and compute: of arms all of whose seeds are there."""
    sets: dict[str, dict[tuple[str, float], list[dict[str, Any]]]] = {}
    for folder in sorted(rows.glob("compute_*")):
        arms: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
        for path in sorted(folder.glob("*-seed-*.json")):
            row = json.loads(path.read_text())
            arms[row["recipe"], row["compute"]].append(row)
        whole = {
            arm: found
            for arm, found in sorted(arms.items())
            if len(found) >= (_SEEDS_OF_LONG if arm[1] >= _LONG else SEEDS_OF_COMPUTE)
        }
        if whole:
            sets[folder.name.removeprefix("compute_")] = whole
    return sets


def compute_table(rows: Path) -> str:
    """Markdown: mean and standard deviation over seeds, in percent, of every finished arm, beside its random start and
    the same network from scratch, and how arms compare; empty where none is finished."""
    texts = []
    for name, arms in finished_arms(rows).items():
        lines = ["| " + " | ".join([name, "compute", "steps", "FLOPs", "hours", *_MEASURES.values()]) + " |"]
        lines.append("|" + "---|" * (5 + len(_MEASURES)))
        for (recipe, compute), found in arms.items():
            cost = [f"{compute:g}", f"{found[0]['steps']:.0f}", f"{found[0]['flops']:.1e}", _mean(found, "hours", 2)]
            lines.append("| " + " | ".join([recipe, *cost, *(_percent(found, key) for key in _MEASURES)]) + " |")
        # What compute does not change, of the arm with the least.
        for recipe in dict.fromkeys(recipe for recipe, _ in arms):
            least = next(found for (one, _), found in arms.items() if one == recipe)
            cells = [_percent(least, _WITHOUT[key]) for key in _MEASURES]
            lines.append("| " + " | ".join([f"{recipe}, without pretraining", "0", "", "", "", *cells]) + " |")
        texts.append("\n".join(lines) + "\n")
        texts.append("".join(_compared(arms)))
    return "\n".join(texts)


def _compared(arms: dict[tuple[str, float], list[dict[str, Any]]]) -> list[str]:
    """A line for every arm against its random start, and against those of other recipes of as much compute that came
    before."""
    lines = []
    for (recipe, compute), found in arms.items():
        title = f"{recipe}, compute {compute:g},"
        start = [{"seed": row["seed"], **{key: row[_WITHOUT[key]] for key in ("knn", "linear")}} for row in found]
        others = {"its random start": start}
        others |= {other: of for (other, its), of in arms.items() if its == compute and other < recipe}
        for other, of_other in others.items():
            rows = {recipe: found, other: of_other}
            lines.append(comparison(rows, recipe, other, {recipe: title, other: other}))
    return lines
