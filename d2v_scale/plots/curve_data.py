"""The curves of runs as the numbers that a page draws from: parts, rows of panels, lines."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from d2v_scale.plots.groups import GROUPS, LAYER, PARTS, Group, line_labels, names_of, sources_of, without_source
from d2v_scale.tracking.figure_names import figure_name
from d2v_scale.tracking.summary import RunSummary

AXES = {"step": "step", "samples": "samples seen", "hours": "hours of wall clock"}
COLOURS = (
    *("#2f7ed8", "#d17000", "#2a9d4a", "#d1495b", "#8a63d2"),
    *("#a0703c", "#cf5fa8", "#6b7785", "#8c8c00", "#0f9aad"),
)
"""Of runs, or of the lines of a single one; to be told from a white and from a dark page."""
_MOST_POINTS = 60_000
"""Of a page, which they make 2 MB large."""
_POINTS_OF_A_LINE = (100, 1000)
"""At least, at most."""


def colour_of(index: int) -> str:
    """Of the run of this number."""
    return COLOURS[index % len(COLOURS)]


def curve_data(summaries: Sequence[RunSummary]) -> dict[str, Any]:
    """What the page's script draws, for JSON: `axes`, `runs`, `positions` (lists of x that lines refer to) and `parts`,
    each with rows of panels. A value that is not finite is null, and its place is in `bad`."""
    rows = {part: [row for group in GROUPS if group.part == part and (row := _row(summaries, group))] for part in PARTS}
    lines = [line for found in rows.values() for row in found for panel in row["panels"] for line in panel["lines"]]
    least, most = _POINTS_OF_A_LINE
    most = max(least, min(most, _MOST_POINTS // max(1, len(lines))))
    positions: dict[tuple[float, ...], int] = {}
    for line in lines:
        _fill(line, summaries[line["run"]], most, positions)
    return {
        "axes": AXES,
        "runs": [{"name": summary.name, "colour": colour_of(i)} for i, summary in enumerate(summaries)],
        "positions": list(positions),
        "parts": [{"title": part, "rows": found} for part, found in rows.items() if found],
    }


def _row(summaries: Sequence[RunSummary], group: Group) -> dict[str, Any] | None:
    """The panels of a group: one for what is of all sources, then one for each source, side by side."""
    names = list(dict.fromkeys(name for summary in summaries for name in names_of(summary.records, group)))
    if len(summaries) > 1:
        names = [name for name in names if LAYER not in name]  # their mean is enough to compare runs by
    if len(names) < group.least:
        return None
    recorded = {name: None for summary in summaries for record in summary.records for name in record}
    sources = sources_of(list(recorded))
    own = {source: {name: short for name in names if (short := without_source(name, source))} for source in sources}
    of_all = [name for name in names if not any(name in found for found in own.values())]
    panels = [_panel(summaries, group.title, line_labels(of_all))] if of_all else []
    for source, found in own.items():
        words = line_labels(list(found.values()))
        labels = {name: words[short] for name, short in found.items()}
        panels += [_panel(summaries, f"{group.title}: {source}", labels)] if found else []
    return {"why": group.why, "log": group.log, "panels": panels}


def _panel(summaries: Sequence[RunSummary], title: str, labels: dict[str, str]) -> dict[str, Any]:
    """`labels`: of the recorded names that are drawn in it."""
    names = list(labels)
    units = {figure_name(name).unit for name in names}
    lines = [
        {"run": run, "name": name, "label": labels[name], "style": style, "colour": colour}
        for run, summary in enumerate(summaries)
        for style, (name, colour) in enumerate(zip(names, _colours(names, run, len(summaries)), strict=True))
        if any(name in record for record in summary.records)
    ]
    return {"title": title, "unit": units.pop() if len(units) == 1 else "", "lines": lines}


def _colours(names: Sequence[str], run: int, runs: int) -> Iterator[str]:
    """A colour a run; of a single run a colour a name, of its layers one a depth."""
    layers = [name for name in names if LAYER in name]
    number = 0
    for name in names:
        if name in layers:
            yield f"hsl({265 - 230 * layers.index(name) / max(1, len(layers) - 1):.0f}, 65%, 52%)"
        else:
            yield colour_of(run if runs > 1 else number)
            number += 1


def _fill(line: dict[str, Any], summary: RunSummary, most: int, positions: dict[tuple[float, ...], int]) -> None:
    """Give the line its points, of which there is one a step at most, and no more than `most`."""
    name = line["name"]
    by_step = {record["step"]: record for record in summary.records if name in record}
    records = [by_step[step] for step in sorted(by_step)]
    values = [float(record[name]) for record in records]
    kept = thinned(values, most)
    line["x"] = {}
    for axis in AXES:
        found = tuple(float(f"{records[i].get(axis, math.nan):.7g}") for i in kept)
        if all(math.isfinite(x) for x in found):
            line["x"][axis] = positions.setdefault(found, len(positions))
    line["y"] = [float(f"{values[i]:.5g}") if math.isfinite(values[i]) else None for i in kept]
    line["bad"] = [place for place, i in enumerate(kept) if not math.isfinite(values[i])]
    line["of"] = len(values)


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Places of at most about `most` values: of every stretch its least, its largest and its first that is not finite,
    so that no peak is lost."""
    if len(values) <= most:
        return list(range(len(values)))
    width = -(-2 * len(values) // most)
    kept = {0, len(values) - 1}
    for start in range(0, len(values), width):
        stretch = range(start, min(start + width, len(values)))
        finite = [i for i in stretch if math.isfinite(values[i])]
        kept |= set([i for i in stretch if not math.isfinite(values[i])][:1])
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)} if finite else set()
    return sorted(kept)
