"""What runs are worth, as tables: figures beside what they are to be compared with, and figures by modality."""

import html
import math
from collections.abc import Sequence
from typing import Any

from d2v_scale.finetuning.metric_names import METRICS
from d2v_scale.plots.groups import sources_of
from d2v_scale.plots.page import table
from d2v_scale.tracking.figure_names import FIGURES, figure_name, shown
from d2v_scale.tracking.names import by_stem
from d2v_scale.tracking.summary import RunSummary

_HIGHER = (
    *("knn_accuracy", "held_out_explained", "probe"),
    *(f"test/{metric}" for kind in ("classify", "regress") for metric in METRICS[kind]),
)
_LOWER = ("loss", "held_out_loss", *(f"test/{metric}" for metric in METRICS["ctc"]))
_SIGNS = ("rankme", "lidar")
"""Without labels: none is better for being higher."""
_COSTS = ("step", "samples", "hours", "samples_per_second", "mfu", "data_wait_share", "device_memory_peak_gib")
_MEDIANS = ("samples_per_second", "mfu", "data_wait_share")
"""Of the whole run; of other costs the last value."""
_WHEN = {"evaluation.every", "evaluation.batch_size"}
"""What values do not depend on."""
_BY_SOURCE = {
    "loss": "loss",
    "held_out_loss": "held-out loss",
    "held_out_explained": "held-out targets explained",
    "target_std": "spread of targets",
    "prediction_std": "spread of predictions",
    "target_rank": "rank of targets",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "knn_accuracy": "k-NN accuracy",
    "masked_share": "hidden positions",
}


def results(summaries: Sequence[RunSummary]) -> str:
    """HTML: a row a figure, a column a run; below a figure what it is to be compared with."""
    recorded = list(dict.fromkeys(name for summary in summaries for record in summary.records for name in record))
    measured_on = {key for s in summaries for key in s.recipe if key.startswith("evaluation.")} - _WHEN
    alike = all(len({s.recipe.get(key) for s in summaries}) == 1 for key in measured_on)
    figures = (*_LOWER[:2], *_HIGHER, *_LOWER[2:])
    quality = [name for figure in figures for name in _recorded_as(figure, recorded)]
    rows: list[tuple[str, list[str]]] = []
    for name in quality:
        higher = not name.startswith(_LOWER)
        cells = [_cell(summary, name, higher) for summary in summaries]
        lasts = [summary.last(name) for summary in summaries]
        rows.append(("", [_words(name), *_marked(cells, lasts, higher, alike and "loss" not in name)]))
        rows += [("baseline", row) for row in _baselines(summaries, name)]
    for name in (name for figure in _SIGNS for name in _recorded_as(figure, recorded)):
        rows.append(("", [_words(name), *(shown(name, summary.last(name)) for summary in summaries)]))
    for name in _COSTS:
        if name in recorded:
            of = RunSummary.median if name in _MEDIANS else RunSummary.last
            rows.append(("", [_words(name), *(shown(name, of(summary, name)) for summary in summaries)]))
    rows.append(("", ["incidents", *(str(len(summary.incidents)) for summary in summaries)]))
    return _table(["", *(html.escape(summary.name) for summary in summaries)], rows)


def by_source(summaries: Sequence[RunSummary]) -> str:
    """HTML: for each run that tells several sources apart the last values of each, side by side; empty: there is no
    such run."""
    parts = []
    for summary in summaries:
        last: dict[str, Any] = {name: value for record in summary.records for name, value in record.items()}
        if len(sources := sources_of(list(last))) < 2:
            continue
        rows = []
        for figure, words in _BY_SOURCE.items():
            values = [last.get(f"{figure}/{source}") for source in sources]
            if any(value is not None for value in values):
                rows.append([words, *(shown(figure, value) for value in values)])
        heading = f"<h3>{html.escape(summary.name)}</h3>" if len(summaries) > 1 else ""
        parts.append(heading + table(["last value", *map(html.escape, sources)], rows))
    return "".join(parts)


def _recorded_as(figure: str, recorded: Sequence[str]) -> list[str]:
    """A figure of all, and of stems where they have their own; the loss, which sources have, too, stands elsewhere."""
    if figure in ("loss", "probe") or figure.startswith("test/"):
        return [name for name in recorded if name == figure or (figure == "probe" and name.startswith("probe/"))]
    return list(by_stem(recorded, figure).values())


def _words(name: str) -> str:
    """With the family's word where it says what it is: `probe: layer 3`, `k-NN accuracy: vision`."""
    family = name.partition("/")[0]
    words = figure_name(name).words
    of_family = "/" in name and name not in FIGURES
    prefix = "fine-tuned: " if family == "test" else f"{figure_name(family).words}: " if of_family else ""
    named = {"samples_per_second": "samples a second (median)", "mfu": "model FLOPs utilisation (median)"}
    named |= {"data_wait_share": "waiting for data (median)", "step": "steps"}
    return html.escape(named.get(name, prefix + words))


def _cell(summary: RunSummary, name: str, higher: bool) -> str:
    """The last value, and the best where that was another."""
    values = [(record["step"], record[name]) for record in summary.records if name in record]
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    if not values:
        return "–"
    text = shown(name, values[-1][1])
    if name == "loss" or not finite:
        return text
    step, best = (max if higher else min)(finite, key=lambda pair: pair[1])
    if shown(name, best) == text:
        return text
    return f"{text} <small>best {shown(name, best)} at step {step}</small>"


def _marked(cells: Sequence[str], lasts: Sequence[float | None], higher: bool, comparable: bool) -> list[str]:
    """The best of several runs in bold, where they are measured on the same."""
    known = [value for value in lasts if value is not None and math.isfinite(value)]
    if len(known) < 2 or not comparable:
        return list(cells)
    best = (max if higher else min)(known)
    pairs = zip(cells, lasts, strict=True)
    return [f"<b>{cell}</b>" if value == best and min(known) < max(known) else cell for cell, value in pairs]


def _baselines(summaries: Sequence[RunSummary], name: str) -> list[list[str]]:
    """What the figure is to be compared with, as far as it was recorded."""
    rows = []
    first = [next(((r["step"], r[name]) for r in s.records if name in r), None) for s in summaries]
    untrained = [None if pair is None or pair[0] != 0 else pair[1] for pair in first]
    if name != "loss":
        of = "with random weights" if not name.startswith("test/") else "before fine-tuning"
        rows.append((of, untrained))
    if name.startswith("knn_accuracy"):
        for figure, words in (("knn_raw", "with raw features"), ("knn_chance", "by chance (the commonest label)")):
            baseline = name.replace("knn_accuracy", figure)
            rows.append((words, [summary.last(baseline) for summary in summaries]))
    return [[words, *(shown(name, value) for value in row)] for words, row in rows if any(v is not None for v in row)]


def _table(head: Sequence[str], rows: Sequence[tuple[str, list[str]]]) -> str:
    """As `table`, rows with a class of their own."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = (f'<tr class="{kind}">{"".join(f"<td>{cell}</td>" for cell in row)}</tr>' for kind, row in rows)
    return f'<div class="scroll"><table class="numbers"><tr>{top}</tr>{"".join(lines)}</table></div>'
