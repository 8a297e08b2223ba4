"""Names of recorded figures: `FIGURE`, or `FIGURE/STEM` and `FIGURE/SOURCE` where there are several, and parts of
either, as `FIGURE/layer_01` or `FIGURE/STEM/target_codes`."""

from collections.abc import Iterable

_PARTS = ("masked_", "target_", "layer_")
"""Beginnings of what is no stem and no source."""


def by_stem(names: Iterable[str], figure: str) -> dict[str, str]:
    """Of `names` those of a figure, by stem or source ("": of all), without its parts; in the order they come."""
    found = {}
    for name in names:
        root, _, rest = name.partition("/")
        if root == figure and not any(word.startswith(_PARTS) for word in rest.split("/")):
            found[rest] = name
    return found


def scores(names: Iterable[str]) -> list[str]:
    """Of `names` what a fine-tuned model was measured by, whatever it is called, but not of how many samples."""
    return [name for name in names if name.startswith("test/") and name not in ("test/samples", "test/lost")]
