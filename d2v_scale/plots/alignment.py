"""The page of an alignment: verdicts, curves by layer, similarities, concepts in a plane, and what retrieval finds."""

import base64
import html
import io
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2v_scale.alignment import scoring, verdict
from d2v_scale.alignment.aligning import Alignment
from d2v_scale.alignment.features import StemSamples
from d2v_scale.alignment.measures import cosines
from d2v_scale.alignment.pairs import RANDOM, Pair
from d2v_scale.alignment.scoring import PairOfLayers
from d2v_scale.data.config import SAMPLE_RATE
from d2v_scale.plots.page import document, section, svg_of, table
from d2v_scale.plots.samples import to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUERIES, _FOUND = 6, 5
_SHOWN = 120
"""Concepts of a similarity matrix."""
_IN_PLANE = 400
_SECONDS = 3.0
_COLOURS = ("#2b6cb0", "#d9822b")
_RUN, _OTHER = "#1d2129", "#a0a6b3"


def page(found: Alignment) -> str:
    """The whole page, which needs nothing beside it."""
    result = found.result
    title = "Alignment of modalities"
    body = [
        f"<h1>{title}</h1>",
        f'<p class="quiet">Written {time.strftime("%F %H:%M UTC", time.gmtime())} by d2v_scale.</p>',
        section("Verdicts", _verdicts(result)),
        section("What was measured", _measured(result)),
    ]
    for number, pair in enumerate(found.pairs):
        name = f"{pair.x} - {pair.y}"
        shown = result["pairs"][name]
        layers = [PairOfLayers(pair.features[pair.runs[0].chosen[measure]]) for measure in _spaces(pair)]
        mapped = layers[0].mapped()
        body += [
            section(html.escape(name), _controls(shown)),
            f'<div class="curves" style="display:block">{svg_of(_curves(shown), f"curves{number}")}</div>',
            f'<div class="pictures">{_picture(_similarities(pair, layers, mapped))}</div>',
            f'<div class="pictures">{_picture(_plane(pair, layers, mapped))}</div>',
            _examples(pair, found.samples, mapped),
        ]
    return document(title, body)


def _spaces(pair: Pair) -> list[str]:
    """Measures whose layers are looked at: through the map, and in the same space where there is one."""
    return [measure for measure in (scoring.MAPPED, scoring.SAME) if measure in pair.runs[0].chosen]


def _verdicts(result: Mapping[str, Any]) -> str:
    rows = []
    for name, pair in result["pairs"].items():
        cells = [html.escape(name)]
        for measure in scoring.MEASURES:
            one = pair["verdicts"].get(measure)
            if one is None:
                cells.append("–")
                continue
            kind = "above" if one["verdict"] == verdict.ABOVE else "not"
            cells.append(f'{one["score"]:z.3f} <span class="{kind}">{one["verdict"]}</span>')
        rows.append(cells)
    return table(["", *scoring.MEASURES], rows) + f'<p class="quiet">{html.escape(result["rule"])}.</p>'


def _measured(result: Mapping[str, Any]) -> str:
    rows = [
        [
            html.escape(one["checkpoint"]),
            str(one["step"]),
            str(one["seed"]),
            html.escape(", ".join(one["stems"])),
        ]
        for one in result["runs"]
    ]
    data = result["data"]
    words = ["used", "equal_to_another", "beyond_per_concept", "without", "lost"]
    counts = [
        [html.escape(f"{stem}, {side.replace('_', ' ')}"), *(str(count[word]) for word in words)]
        for stem, sides in data["samples"].items()
        for side, count in sides.items()
    ]
    both = "".join(
        f"<p>{len(names)} held-out concepts are left out: {html.escape(what)} is on the training side "
        f"({html.escape(', '.join(names[:3]))}).</p>"
        for what, names in data["on_both_sides"].items()
    )
    raw = ", ".join(f"{stem}: {name}" for stem, name in result["raw_features"].items())
    return (
        table(["run", "step", "seed", "stems"], rows, "words")
        + table(["samples", *(word.replace("_", " ") for word in words)], counts)
        + both
        + f'<p class="quiet">Features: {html.escape(result["features"])}. Raw features: {html.escape(raw)}.</p>'
    )


def _controls(pair: Mapping[str, Any]) -> str:
    """Every comparison of a pair."""
    rows = []
    for measure, one in pair["verdicts"].items():
        for control, against in one["against"].items():
            kind = "above" if against["above"] else "not"
            rows.append(
                [
                    html.escape(measure),
                    html.escape(control),
                    f"{against['score']:z.3f}",
                    f"{against['control']:z.3f}",
                    f"{against['difference']:+z.3f}",
                    f'<span class="{kind}">{against["lower_bound"]:+z.3f}</span>',
                ]
            )
    notes = "".join(f'<p class="quiet">{html.escape(note)}</p>' for note in pair["notes"])
    counts = f"<p>{pair['held_out_concepts']} held-out concepts, {pair['training_concepts']} training concepts.</p>"
    head = ["measure", "control", "score", "control's", "difference", "lower bound"]
    return counts + notes + table(head, rows, "named")


def _curves(pair: Mapping[str, Any]) -> "Figure":
    """A panel a measure: runs, random encoders, chance."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [name for name in (*scoring.MEASURES, "modality gap") if pair["layers"]["runs"][0].get(name) is not None]
    figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        for kind, colour, label in (("runs", _RUN, "runs"), (RANDOM, _OTHER, RANDOM)):
            layers = pair["layers"][kind]
            axes.plot([one["layer"] for one in layers], [one[name] for one in layers], "o-", color=colour, label=label)
        chance = pair["chance"].get("R@10" if "R@10" in name else name)
        if chance is not None:
            axes.axhline(chance, color=_OTHER, linestyle=":", label="chance")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("layer", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        bottom, top = min(0.0, axes.get_ylim()[0]), axes.get_ylim()[1]
        axes.set_ylim(bottom, top + 0.08 * (top - bottom))
        if index == 0:
            axes.legend(fontsize=7)
    return figure


def _similarities(pair: Pair, layers: Sequence[PairOfLayers], mapped: tuple[Tensor, Tensor]) -> "Figure":
    """Cosines of every concept of one modality with every one of the other; own partners lie on the diagonal."""
    from matplotlib.figure import Figure

    order = sorted(range(len(pair.test_concepts)), key=lambda n: (pair.test_categories[n] or "", pair.test_concepts[n]))
    chosen = torch.tensor(order)[torch.linspace(0, len(order) - 1, min(_SHOWN, len(order))).round().long()]
    shown = {"mapped": cosines(mapped[0][chosen], mapped[1][chosen])}
    if len(layers) > 1:
        same = layers[1].features
        shown["same space"] = cosines(same.test_x_nd[chosen], same.test_y_ne[chosen])
    figure = Figure(figsize=(5.2 * len(shown), 4.6), layout="constrained")
    for index, (name, values) in enumerate(shown.items()):
        axes = figure.add_subplot(1, len(shown), index + 1)
        low, high = np.quantile(values.numpy(), [0.01, 0.99])
        image = axes.imshow(values.numpy(), cmap="magma", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
        axes.set_title(f"cosine, {name}: own partners on the diagonal", fontsize=9)
        axes.set_xlabel(f"{pair.y}: {len(chosen)} held-out concepts, by category", fontsize=8)
        axes.set_ylabel(pair.x, fontsize=8)
        axes.tick_params(labelsize=7)
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def _plane(pair: Pair, layers: Sequence[PairOfLayers], mapped: tuple[Tensor, Tensor]) -> "Figure":
    """Both modalities' concepts along their first two principal components, partners joined."""
    from matplotlib.figure import Figure

    shown = {"mapped": mapped}
    if len(layers) > 1:
        shown["same space"] = layers[1].features.test_x_nd, layers[1].features.test_y_ne
    figure = Figure(figsize=(5.2 * len(shown), 4.6), layout="constrained")
    for index, (name, both) in enumerate(shown.items()):
        _draw_plane(figure.add_subplot(1, len(shown), index + 1), pair, name, both)
    return figure


def _draw_plane(axes: "Axes", pair: Pair, name: str, both: tuple[Tensor, Tensor]) -> None:
    from matplotlib.collections import LineCollection

    count = min(_IN_PLANE, len(both[0]))
    unit_nd = torch.cat([F.normalize(one[:count].double(), dim=-1) for one in both])
    centred_nd = unit_nd - unit_nd.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred_nd, full_matrices=False)
    plane_n2 = (centred_nd @ F.pad(directions[:2].T, (0, max(0, 2 - len(directions))))).numpy()
    partners = np.stack([plane_n2[:count], plane_n2[count:]], axis=1)  # one collection: many lines take seconds
    axes.add_collection(LineCollection(list(partners), colors="#c8ccd6", linewidths=0.4, zorder=1))
    for part, (stem, colour) in enumerate(zip((pair.x, pair.y), _COLOURS, strict=True)):
        points = plane_n2[part * count : (part + 1) * count]
        axes.scatter(points[:, 0], points[:, 1], s=9, color=colour, label=stem, zorder=2)
    axes.set_title(f"concepts in two dimensions, {name}; lines join partners", fontsize=9)
    axes.legend(fontsize=7, loc="upper right")  # the best place takes seconds to be found among so many lines
    axes.tick_params(labelsize=7)


def _picture(figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return f'<figure><img alt="" src="data:image/png;base64,{_base64(buffer.getvalue())}"></figure>'


def _examples(pair: Pair, samples: Mapping[str, StemSamples], mapped: tuple[Tensor, Tensor]) -> str:
    """What is nearest to some held-out concepts, evenly spaced and not chosen."""
    similarity_nn = cosines(*mapped)
    count = len(pair.test_concepts)
    queries = torch.linspace(0, count - 1, min(_QUERIES, count)).round().long().tolist()
    rows = []
    for query in queries:
        nearest = similarity_nn[query].topk(min(_FOUND, count)).indices.tolist()
        place = int((similarity_nn[query] >= similarity_nn[query, query] - 1e-6).sum())
        cells = [_cell(samples[pair.x], pair.test_concepts[query], "")]
        for item in nearest:
            cells.append(_cell(samples[pair.y], pair.test_concepts[item], "own" if item == query else ""))
        cells.append(f"<td>own partner: {place} of {count}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = f"<p>{html.escape(pair.x)}, and the nearest {html.escape(pair.y)} through the map (own partner framed):</p>"
    return f'{head}<div class="scroll"><table class="found">{"".join(rows)}</table></div>'


def _cell(samples: StemSamples, concept: str, kind: str) -> str:
    return f'<td class="{kind}">{_shown(samples, concept)}<div>{html.escape(concept[:40])}</div></td>'


def _shown(samples: StemSamples, concept: str) -> str:
    """A sample of the concept as HTML: a picture, a recording to listen to, a text."""
    batch = samples.one(concept)
    if batch is None:
        return "–"
    if samples.kind.content == "text":
        caption = samples.caption(concept)
        return f"“{html.escape(caption[:120])}”" if caption else "(ids)"
    sample = samples.kind.build_drawing().sample(batch, 0, None)
    if isinstance(sample, str):
        return html.escape(sample[:120])
    if sample.dim() == 1:
        return f'<audio controls preload="none" src="data:audio/flac;base64,{_base64(_flac(sample))}"></audio>'
    return f'<img alt="" src="data:image/png;base64,{_base64(_thumbnail(sample))}">'


def _flac(wave_s: Tensor) -> bytes:
    """The beginning of a recording, as loud as it may be."""
    import soundfile

    wave = wave_s[: round(_SECONDS * SAMPLE_RATE)].float().cpu().numpy()
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.9 * wave / max(1e-6, float(np.abs(wave).max())), SAMPLE_RATE, format="FLAC")
    return buffer.getvalue()


def _thumbnail(image_chw: Tensor) -> bytes:
    from PIL import Image

    picture = Image.fromarray((255 * to_image(image_chw)).astype(np.uint8))
    picture.thumbnail((96, 96))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
