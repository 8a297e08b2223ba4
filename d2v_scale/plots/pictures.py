"""The pictures of runs in a page: each once, runs side by side, no larger than there is room for."""

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from pathlib import Path

from d2v_scale.tracking.summary import RunSummary

TITLES = {
    "masks": ("What the student does not see", "Samples with the masks of their clones, as training draws them."),
    "first_batch": ("The first batch, with its masks", ""),
    "neighbours": (
        "Nearest neighbours",
        "A sample, and the others that the teacher's features place nearest; green: of the same label.",
    ),
    "pca": (
        "What the teacher sees",
        "The three main directions of its states as colours: parts of one colour are alike to it.",
    ),
    "similarity": ("How alike moments of a recording are", "Cosine between the teacher's states of all its moments."),
    "layers_teacher_teacher": (
        "Likeness of the teacher's layers to one another",
        "Linear CKA of every layer with every other, of one network: the diagonal is 1 by itself.",
    ),
    "layers_student_student": (
        "Likeness of the student's layers to one another",
        "Linear CKA of every layer with every other, of one network: the diagonal is 1 by itself.",
    ),
    "layers_teacher_student": (
        "Likeness of teacher and student, layer by layer",
        "Linear CKA between two networks: the diagonal says how near the student's layers are to the teacher's.",
    ),
    "separation": ("How far modalities lie apart", "Of trained and of random weights, layer by layer."),
}
"""By the file's name, which may go on with that of a stem: what it shows, and how it is read."""
_DRAWN_BY_CURVES = {"health"}
"""What the page draws itself."""
_ROOM = 2_500_000
"""Bytes of all pictures of a page, as they stand in it."""
_WIDEST, _SMALL = 1400, 800
"""Pixels."""


def pictures(summaries: Sequence[RunSummary]) -> str:
    """HTML. One that is the same in several runs is shown once; what there is no room for is named."""
    names = sorted({path.stem for summary in summaries for path in (summary.run_dir / "plots").glob("*.png")})
    names = sorted(set(names) - _DRAWN_BY_CURVES, key=_order)
    files = {name: _by_content(summaries, name) for name in names}
    count = sum(len(found) for found in files.values())
    room, parts, left_out = _ROOM, [], []
    for name in names:
        shown = []
        for path, runs in files[name]:
            share = room // max(1, count)
            count -= 1
            image = _image(path, share)
            if image is None:
                left_out.append(str(path))
                continue
            room -= len(image)
            caption = html.escape(", ".join(runs) + (": the same picture" if len(runs) > 1 else ""))
            alt = html.escape(f"{title_of(name)[0]}: {', '.join(runs)}")
            shown.append(f'<figure><img alt="{alt}" src="{image}"><figcaption>{caption}</figcaption></figure>')
        if shown:
            title, why = (html.escape(words) for words in title_of(name))
            parts.append(f'<h3>{title}</h3><p class="quiet">{why}</p><div class="pictures">{"".join(shown)}</div>')
    if left_out:
        parts.append(f'<p class="quiet">Too large for this page: {html.escape(", ".join(left_out))}.</p>')
    return "".join(parts) or "<p>None were drawn.</p>"


def title_of(name: str) -> tuple[str, str]:
    """What a picture shows, and how it is read; of one that is not known, its name in words."""
    known = [each for each in TITLES if name == each or name.startswith(f"{each}_")]
    if not known:
        return name.replace("_", " "), ""
    best = max(known, key=len)
    title, why = TITLES[best]
    stem = name[len(best) + 1 :].replace("_", " ")
    return (f"{title}: {stem}" if stem else title), why


def _order(name: str) -> tuple[int, str]:
    known = [place for place, each in enumerate(TITLES) if name.startswith(each)]
    return (known[0] if known else len(TITLES)), name


def _by_content(summaries: Sequence[RunSummary], name: str) -> list[tuple[Path, list[str]]]:
    """Files of that name that differ, each with the runs that have it."""
    found: dict[str, tuple[Path, list[str]]] = {}
    for summary in summaries:
        path = summary.run_dir / "plots" / f"{name}.png"
        if path.exists():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found.setdefault(digest, (path, []))[1].append(summary.name)
    return list(found.values())


def _image(path: Path, most: int) -> str | None:
    """The picture as it is, or smaller, so that it takes `most` bytes of the page; None where even that is too much."""
    as_it_is = _address("png", path.read_bytes())
    if len(as_it_is) <= most:
        return as_it_is
    from PIL import Image

    for width, quality in ((_WIDEST, 85), (_SMALL, 75)):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        image.thumbnail((width, 8 * width))
        written = io.BytesIO()
        image.save(written, "WEBP", quality=quality)
        if len(smaller := _address("webp", written.getvalue())) <= most:
            return smaller
    return None


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
