"""One page about one run or several: figures, differences, curves, incidents, pictures. Needs no network to be read."""

import base64
import html
import math
import time
from collections.abc import Sequence
from pathlib import Path

from d2v_scale.plots.curves import GROUPS, LAYER, finish_axes, names_of, series
from d2v_scale.plots.page import document, section, svg_of, table
from d2v_scale.tracking.summary import RunSummary, recipe_differences

AXES = {"step": "step", "samples": "samples seen", "hours": "hours of wall clock"}
_DASHES: tuple[tuple[float, ...], ...] = (
    *((), (5, 2), (1, 1.5), (6, 2, 1, 2)),
    *((9, 3), (3, 1, 1, 1, 1, 1), (1, 4), (9, 2, 3, 2)),
)
"""On and off lengths, in widths of the line: as many as a panel has names."""
_MAX_POINTS = 1000


def write_report(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write the page. Raises FileNotFoundError for a directory without a record."""
    summaries = [RunSummary.load(run_dir) for run_dir in run_dirs]
    colours = _colours(len(summaries))
    title = summaries[0].name if len(summaries) == 1 else f"Comparison of {len(summaries)} runs"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="quiet">Written {time.strftime("%F %H:%M UTC", time.gmtime())} by d2v_scale.</p>',
        section("Runs", _overview(summaries, colours)),
        section("What differs in the recipe", _differences(summaries)),
        section("Curves", _curves(summaries, colours)),
        section("Incidents", _incidents(summaries)),
        section("Pictures", _pictures(summaries)),
        section("Where it ran", _environment(summaries)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(title, body))
    return path


def _number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def _overview(summaries: Sequence[RunSummary], colours: Sequence[str]) -> str:
    head = ["run", "ended", "steps", "samples", "hours", "loss first", "loss last", "k-NN first", "k-NN best",
            "k-NN last", "samples/s", "MFU", "data wait", "incidents"]  # fmt: skip
    rows = []
    for summary, colour in zip(summaries, colours, strict=True):
        rows.append(
            [
                f'<span class="swatch" style="background:{colour}"></span> {html.escape(summary.name)}',
                html.escape(summary.outcome),
                _number(summary.last("step"), "d"),
                _number(summary.last("samples"), ",d"),
                _number(summary.last("hours"), ".2f"),
                _number(summary.first("loss")),
                _number(summary.last("loss")),
                _number(summary.first("knn_accuracy"), ".3f"),
                _number(summary.best("knn_accuracy"), ".3f"),
                _number(summary.last("knn_accuracy"), ".3f"),
                _number(summary.median("samples_per_second"), ",.0f"),
                _number(summary.median("mfu"), ".1%"),
                _number(summary.median("data_wait_share"), ".1%"),
                str(len(summary.incidents)),
            ]
        )
    return table(head, rows)


def _differences(summaries: Sequence[RunSummary]) -> str:
    if len(summaries) == 1:
        return '<p class="quiet">One run: nothing to compare.</p>'
    different = recipe_differences(summaries)
    if not different:
        return "<p>The recipes are the same.</p>"
    rows = [
        [html.escape(key), *("–" if value is None else html.escape(value) for value in values)]
        for key, values in different.items()
    ]
    return table(["key", *(html.escape(summary.name) for summary in summaries)], rows)


def _curves(summaries: Sequence[RunSummary], colours: Sequence[str]) -> str:
    """The same panels over each of the axes, chosen by a radio button: no script."""
    parts = ['<div class="tabs">']
    for index, (axis, label) in enumerate(AXES.items()):
        checked = " checked" if index == 0 else ""
        parts.append(
            f'<input type="radio" name="axis" id="axis-{axis}"{checked}><label for="axis-{axis}">{label}</label> '
        )
    for axis, label in AXES.items():
        parts.append(f'<div class="curves" id="curves-{axis}">{_panels(summaries, colours, axis, label)}</div>')
    return "".join([*parts, "</div>"])


def _panels(summaries: Sequence[RunSummary], colours: Sequence[str], axis: str, label: str) -> str:
    """One SVG: a panel a group; a colour a run, a line style a name."""
    from matplotlib.figure import Figure

    groups = []
    for group in GROUPS:
        names = list(dict.fromkeys(name for summary in summaries for name in names_of(summary.records, group)))
        names = [name for name in names if LAYER not in name]  # their mean is enough to compare runs by
        if names:
            groups.append((group, names))
    if not groups:
        return "<p>No values are recorded yet.</p>"
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4.1 * columns, 2.9 * rows), layout="constrained")
    for index, (group, names) in enumerate(groups):
        axes = figure.add_subplot(rows, columns, index + 1)
        drawn: list[float] = []
        for summary, colour in zip(summaries, colours, strict=True):
            for number, name in enumerate(names):
                x, y = series(summary.records, name, axis)
                keep = slice(None, None, max(1, len(x) // _MAX_POINTS))
                style = {"dashes": _DASHES[number % len(_DASHES)], "linewidth": 1.3, "color": colour}
                axes.plot(x[keep], y[keep], marker="o" if len(x) < 15 else "", markersize=3, **style)  # type: ignore[arg-type]
                drawn += [value for value in y if math.isfinite(value)]
        if len(names) > 1:
            for number, name in enumerate(names):
                axes.plot([], [], color="black", dashes=_DASHES[number % len(_DASHES)], label=name)
        finish_axes(axes, group, drawn, len(names) if len(names) > 1 else 0)
        axes.set_xlabel(label, fontsize=8, loc="right")
    return svg_of(figure, axis)


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


def _pictures(summaries: Sequence[RunSummary]) -> str:
    names = sorted({path.name for summary in summaries for path in (summary.run_dir / "plots").glob("*.png")})
    parts = []
    for name in names:
        shown = []
        for summary in summaries:
            path = summary.run_dir / "plots" / name
            if path.exists():
                data = base64.b64encode(path.read_bytes()).decode()
                caption = html.escape(f"{summary.name}: {path.stem}")
                image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
                shown.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
        parts.append(f'<div class="pictures">{"".join(shown)}</div>')
    return "".join(parts) or "<p>None were drawn.</p>"


def _environment(summaries: Sequence[RunSummary]) -> str:
    keys = list(dict.fromkeys(key for summary in summaries for key in sorted(summary.tags)))
    rows = [[html.escape(key), *(html.escape(summary.tags.get(key, "–")) for summary in summaries)] for key in keys]
    return table(["", *(html.escape(summary.name) for summary in summaries)], rows) if rows else "<p>Not recorded.</p>"


def _colours(count: int) -> list[str]:
    import matplotlib
    from matplotlib.colors import to_hex

    wheel = [to_hex(colour) for colour in matplotlib.colormaps["tab10"].colors]  # type: ignore[attr-defined]
    return [wheel[index % len(wheel)] for index in range(count)]
