"""Tables of joint training: every arm on every set, and what pairs of samples change."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence_pairs_table import lower_bound

Rows = Mapping[str, Sequence[Mapping[str, Any]]]
"""By arm, one a seed."""
MEASURES = {"knn": "k-NN", "linear": "linear"}
_ORDER = ("separate", "alternate", "together", "paired", "shuffled")


def written(rows: Path) -> str:
    """Markdown of all seeds that every arm has; empty where there is none."""
    texts = []
    for folder in sorted(rows.glob("joint_*_[0-9]*")):
        found: dict[str, list[Mapping[str, Any]]] = {arm: [] for arm in _ORDER}
        for path in sorted(folder.glob("*-seed-*.json")):
            row = json.loads(path.read_text())
            found[row["arm"]].append(row)
        there = {arm: some for arm, some in found.items() if some}
        shared = set.intersection(*({row["seed"] for row in some} for some in there.values())) if there else set()
        if shared:
            whole = {arm: [row for row in some if row["seed"] in shared] for arm, some in there.items()}
            name, steps = folder.name.removeprefix("joint_").rsplit("_", 1)
            texts.append(of_set(f"{name}, {steps} steps", whole))
    return "\n".join(texts)


def of_set(name: str, rows: Rows) -> str:
    """Two tables, percent, and the comparisons that the arms are for."""
    rows_of_one = next(iter(rows.values()))
    first = rows_of_one[0]
    stems, pairs = list(first["stems"]), list(first["pairs"])
    probed = [(stem, measure) for stem in stems for measure in MEASURES]
    ways = [(pair, way) for pair in pairs for way in ("same", "mapped")]
    shown = (*rows.items(), *_random(rows))
    counted = f"{len(rows_of_one)} seed{'s' * (len(rows_of_one) > 1)}"
    lines = _head(f"{name}, {counted}: arm", [f"{stem}, {MEASURES[measure]}" for stem, measure in probed])
    lines += [_line(arm, [[row["stems"][s][m] for row in some] for s, m in probed]) for arm, some in shown]
    lines += ["", *_head(f"{name}, {first['retrieval']}: arm", [f"{pair}, {way}" for pair, way in ways])]
    lines += [_line(arm, [[row["pairs"][p][way] for row in some] for p, way in ways]) for arm, some in shown]
    lines.append(_line("chance", [[first["pairs"][pair]["chance"]] for pair, _ in ways]))
    return "\n".join([*lines, "", *_comparisons(rows, stems, pairs)]) + "\n"


def _random(rows: Rows) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """As `together` begins (else another arm): every encoder's random start is of one shape."""
    some = rows.get("together") or next(iter(rows.values()))
    return [("random start", [{"stems": row["random_stems"], "pairs": row["random_pairs"]} for row in some])]


def _comparisons(rows: Rows, stems: Sequence[str], pairs: Sequence[str]) -> list[str]:
    """Of arms with the same seeds: the mean difference, and the lower end of its 95 % interval."""
    lines = []
    if "paired" in rows and "shuffled" in rows:
        for way in ("mapped", "same"):
            told = [f"{p} {_against(rows, 'paired', 'shuffled', ('pairs', p, way))}" for p in pairs]
            lines.append(f"- paired against shuffled, {way} {rows['paired'][0]['retrieval']}: {'; '.join(told)}.")
    for arm in ("alternate", "together", "paired"):
        if arm in rows and "separate" in rows:
            told = [f"{s} {_against(rows, arm, 'separate', ('stems', s, 'knn'))}" for s in stems]
            lines.append(f"- {arm} against separate, k-NN: {'; '.join(told)}.")
    return lines


def _against(rows: Rows, arm: str, other: str, at: tuple[str, str, str]) -> str:
    values = [{row["seed"]: 100 * row[at[0]][at[1]][at[2]] for row in rows[one]} for one in (arm, other)]
    differences = [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]
    if not differences:
        return "no seed in common"
    mean = f"{np.mean(differences):+.1f}"
    return mean + (f", 95 % from {lower_bound(differences):+.1f}" if len(differences) > 1 else " (one seed)")


def _head(first: str, columns: Sequence[str]) -> list[str]:
    return ["| " + " | ".join([first, *columns]) + " |", "|" + "---|" * (1 + len(columns))]


def _line(name: str, cells: Sequence[Sequence[float]]) -> str:
    percent = [[100 * value for value in cell] for cell in cells]
    shown = [f"{np.mean(v):.1f}" + (f" ± {np.std(v, ddof=1):.1f}" if len(v) > 1 else "") for v in percent]
    return "| " + " | ".join([name, *shown]) + " |"
