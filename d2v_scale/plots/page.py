"""A page that needs no network and no script to be read: its style, its tables, drawings inside it."""

import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem; color: #1d2129; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #d6d9e0; }
table { border-collapse: collapse; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e6e8ee; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
td:first-child { white-space: nowrap; } th { font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
.curves { display: none; }
.tabs > label { padding: .2rem .9rem; border: 1px solid #c8ccd6; border-radius: 4px; cursor: pointer; }
.curves { margin-top: .6rem; }
.tabs > input { position: absolute; opacity: 0; }
#axis-step:checked ~ #curves-step, #axis-samples:checked ~ #curves-samples, #axis-hours:checked ~ #curves-hours
  { display: block; }
#axis-step:checked + label, #axis-samples:checked + label, #axis-hours:checked + label
  { background: #1d2129; color: #fff; }
#axis-step:focus-visible + label, #axis-samples:focus-visible + label, #axis-hours:focus-visible + label
  { outline: 2px solid #3b6fd4; }
.curves svg, .pictures img { max-width: 100%; height: auto; } .pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 480px; } figcaption { font-size: .85rem; color: #555c6b; }
.scroll { overflow-x: auto; } .quiet { color: #6a7180; }
.above { color: #1d7a38; font-weight: 600; } .not { color: #9a5b00; }
.found td { text-align: center; vertical-align: top; font-size: .8rem; border-bottom: 1px solid #e6e8ee; }
.found img { width: 72px; height: 72px; object-fit: contain; image-rendering: pixelated; display: block; margin: auto; }
.found audio { width: 150px; height: 32px; } .found .own { outline: 3px solid #2a9d4a; outline-offset: -3px; }
.found td:first-child { background: #f2f4f8; }
"""


def document(title: str, body: Iterable[str]) -> str:
    """The whole page. `body`: HTML."""
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"


def section(title: str, content: str) -> str:
    """`content` under a heading, both HTML."""
    return f"<h2>{title}</h2>{content}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "numbers") -> str:
    """Cells are HTML; `kind` numbers or words says how they are aligned."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{top}</tr>{lines}</table></div>'


def svg_of(figure: "Figure", prefix: str) -> str:
    """A figure as an element of the page. `prefix`: a name for it, as identifiers are page-wide."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "d2v_scale"}):
        figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return svg.replace('id="', f'id="{prefix}-').replace('"#', f'"#{prefix}-').replace("url(#", f"url(#{prefix}-")
