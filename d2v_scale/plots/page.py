"""A page that needs no network to be read: its style, its tables, drawings inside it."""

import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light; --page: #fff; --raised: #f7f8fa; --text: #1d2129; --quiet: #5f6776; --line: #dfe2e8;
  --good: #1d7a38; --look: #9a5b00; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { DARK } }
:root[data-theme=dark] { DARK }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1240px; padding: 0 1rem; color: var(--text);
  background: var(--page); }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child, .words td, .words th,
.named td:nth-child(2), .named th:nth-child(2) { text-align: left; }
td:first-child { white-space: nowrap; } th { font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; }
.curves svg, .pictures img { max-width: 100%; height: auto; } .pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.curves svg { background: #fff; }
figure { margin: 0; flex: 1 1 480px; } figcaption { font-size: .85rem; color: var(--quiet); }
.scroll { overflow-x: auto; } .scroll + .scroll { margin-top: 1rem; } .quiet { color: var(--quiet); }
.above { color: var(--good); font-weight: 600; } .not { color: var(--look); }
.found td { text-align: center; vertical-align: top; font-size: .8rem; border-bottom: 1px solid var(--line); }
.found img { width: 72px; height: 72px; object-fit: contain; image-rendering: pixelated; display: block; margin: auto; }
.found audio { width: 150px; height: 32px; } .found .own { outline: 3px solid #2a9d4a; outline-offset: -3px; }
.found td:first-child { background: var(--raised); }
""".replace(
    "DARK",
    "color-scheme: dark; --page: #14171c; --raised: #1e222a; --text: #e4e7ec; --quiet: #9aa3b2; --line: #343a45; "
    "--good: #5fc97e; --look: #e0a33e;",
)
_POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Nothing of the page comes from elsewhere, and browsers see to it."""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """The whole page. `body`: HTML. `style`: CSS beside what every page has."""
    head = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style></head>",
    ]
    return f"{''.join(head)}<body>{''.join(body)}</body></html>\n"


def section(title: str, content: str) -> str:
    """`content` under a heading, both HTML."""
    return f"<h2>{title}</h2>{content}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "numbers") -> str:
    """Cells are HTML; `kind` says how they are aligned: numbers, words, or named, two columns of words first."""
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
