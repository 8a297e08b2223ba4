"""One page about one run or several: verdict, result and what differs, then curves, incidents, pictures.

Needs no network to be read. uPlot (vendored/uPlot, whole and unchanged) draws the curves.
"""

import html
import json
import time
from collections.abc import Sequence
from pathlib import Path

from d2v_scale.plots.curve_data import AXES, colour_of, curve_data
from d2v_scale.plots.page import document, section, table
from d2v_scale.plots.pictures import pictures
from d2v_scale.plots.results import by_source, results
from d2v_scale.tracking.account import read_account, rows
from d2v_scale.tracking.summary import RunSummary, recipe_differences

_HERE = Path(__file__).parent
_DIFFERENCES = 12
"""Keys that are told at once."""
UPLOT = _HERE / "vendored" / "uPlot"


def write_report(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write the page. Raises FileNotFoundError for a directory without a record."""
    summaries = [RunSummary.load(run_dir) for run_dir in run_dirs]
    title = summaries[0].name if len(summaries) == 1 else f"Comparison of {len(summaries)} runs"
    body = [
        f'<div class="top"><h1>{html.escape(title)}</h1><button type="button" id="theme">dark page</button></div>',
        f'<p class="quiet">Written {time.strftime("%F %H:%M UTC", time.gmtime())} by d2v_scale.</p>',
        f'<div class="cards">{"".join(_card(summary, number) for number, summary in enumerate(summaries))}</div>',
        section("Result", results(summaries)),
        section("Where the time went", spent) if (spent := _spent(summaries)) else "",
        section("By modality", modalities) if (modalities := by_source(summaries)) else "",
        section("What differs in the recipe", _differences(summaries)) if len(summaries) > 1 else "",
        _controls(summaries),
        '<div id="curves"></div>' if any(summary.records for summary in summaries) else "<p>No curves yet.</p>",
        section("Incidents", _incidents(summaries)),
        section("Pictures", pictures(summaries)),
        section("Where it ran", _environment(summaries)),
        _scripts(summaries),
    ]
    style = (UPLOT / "uPlot.min.css").read_text() + (_HERE / "browser" / "report.css").read_text()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(title, body, style), encoding="utf-8")
    return path


def _card(summary: RunSummary, number: int) -> str:
    """What a run is, how it ended, whether it is healthy."""
    kind = "healthy" if summary.verdict.startswith("Healthy") else "look"
    lines = [
        f"<p>{html.escape(summary.ended)}</p>",
        f'<p class="{kind}">{html.escape(summary.verdict)}</p>',
        f'<p class="quiet">{html.escape(recipe)}</p>' if (recipe := summary.recipe.get("name")) else "",
    ]
    heading = f"<h3>{html.escape(summary.name)}</h3>"
    return f'<div class="card" style="--run:{colour_of(number)}">{heading}{"".join(lines)}</div>'


def _spent(summaries: Sequence[RunSummary]) -> str:
    """For each run with a timeline what its seconds went into, by attempt."""
    parts = []
    for summary in summaries:
        found = rows(read_account(summary.run_dir))
        if found:
            heading = f"<h3>{html.escape(summary.name)}</h3>" if len(summaries) > 1 else ""
            parts.append(heading + table(found[0], found[1:]))
    return "".join(parts)


def _differences(summaries: Sequence[RunSummary]) -> str:
    different = recipe_differences(summaries)
    if not different:
        return "<p>The recipes are the same.</p>"
    rows = [
        [html.escape(key), *("–" if value is None else html.escape(value) for value in values)]
        for key, values in different.items()
    ]
    head = ["key", *(html.escape(summary.name) for summary in summaries)]
    few = table(head, rows[:_DIFFERENCES])
    if len(rows) <= _DIFFERENCES:
        return few
    rest = table(head, rows[_DIFFERENCES:])
    return f"{few}<details><summary>{len(rows) - _DIFFERENCES} more keys</summary>{rest}</details>"


def _controls(summaries: Sequence[RunSummary]) -> str:
    """What the script listens to: axis, scale, smoothing, runs."""
    axes = "".join(f'<option value="{axis}">{label}</option>' for axis, label in AXES.items())
    scales = '<option value="auto">as suits</option><option value="linear">linear</option>'
    runs = "".join(
        f'<label><input type="checkbox" data-run="{number}" checked> <i class="swatch" '
        f'style="background:{colour_of(number)}"></i> {html.escape(summary.name)}</label>'
        for number, summary in enumerate(summaries)
    )
    return (
        '<div class="bar">'
        f'<label>over <select id="axis">{axes}</select></label>'
        f'<label>scale <select id="scale">{scales}<option value="log">logarithmic</option></select></label>'
        '<label>smoothing <input type="range" id="smoothing" min="0" max="0.99" step="0.01" value="0"></label>'
        '<button type="button" id="whole">whole range</button>'
        f"{runs if len(summaries) > 1 else ''}</div>"
        "<noscript><p>The curves are drawn by a script in this page, which this browser does not run.</p></noscript>"
        '<p class="quiet">Drag over a chart to zoom all of them, double-click or “whole range” to go back; '
        "a name below a chart takes its line away.</p>"
    )


def _incidents(summaries: Sequence[RunSummary]) -> str:
    rows = [
        [
            html.escape(summary.name),
            "–" if incident.step is None else str(incident.step),
            time.strftime("%F %T", time.gmtime(incident.time)) if incident.time else "–",
            html.escape(incident.what),
        ]
        for summary in summaries
        for incident in summary.incidents
    ]
    return table(["run", "step", "time (UTC)", "what"], rows, "words") if rows else "<p>None.</p>"


def _environment(summaries: Sequence[RunSummary]) -> str:
    keys = list(dict.fromkeys(key for summary in summaries for key in sorted(summary.tags)))
    rows = [[html.escape(key), *(html.escape(summary.tags.get(key, "–")) for summary in summaries)] for key in keys]
    head = ["", *(html.escape(summary.name) for summary in summaries)]
    return table(head, rows, "words") if rows else "<p>Not recorded.</p>"


def _scripts(summaries: Sequence[RunSummary]) -> str:
    """The numbers, uPlot with its licence, and what draws with it."""
    if not any(summary.records for summary in summaries):
        return ""
    # No text of a run ends the element it stands in.
    numbers = json.dumps(curve_data(summaries), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    licence = (UPLOT / "LICENSE").read_text()
    return (
        f'<script type="application/json" id="data">{numbers}</script>\n<!-- uPlot:\n{licence}\n-->\n'
        f"<script>{(UPLOT / 'uPlot.iife.min.js').read_text()}</script>\n"
        f"<script>{(_HERE / 'browser' / 'report.js').read_text()}</script>"
    )
