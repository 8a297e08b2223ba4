"""Under which names MLflow shows a figure: its page sorts charts by the part before the last slash, and opens the
first.

A figure keeps the name that it has in metrics.jsonl, so that filters (`metrics.loss < 1`) and older runs go on. What a
run is worth is shown a second time in a section that comes first, and what is measured of each source in one of its
stem, so that a joint run lies on one chart with runs of its modalities.
"""

from collections.abc import Iterable, Mapping

QUALITY = "1 quality"
_WORTH = ("loss", "held_out_loss", "held_out_explained", "rankme", "lidar", "knn_accuracy", "knn_raw", "knn_chance")
_TEST, _SAMPLES = "test/", "test/samples"
_OF_A_SOURCE = ("loss", "target_std", "prediction_std", "masked_share")


def shown_as(name: str, stems: Mapping[str, str]) -> list[str]:
    """All names of a figure. `stems`: of every source that is measured by itself; {}: not known."""
    names = [name]
    if name in _WORTH or (name.startswith(_TEST) and name != _SAMPLES):
        names.append(f"{QUALITY}/{name.removeprefix(_TEST)}")
    figure, _, whose = name.partition("/")
    if figure not in (*_OF_A_SOURCE, *_WORTH):
        return names
    # What is measured of a single source bears no name.
    if not whose and len(stems) == 1:
        whose = next(iter(stems))
    if whose in stems:
        names.append(f"2 {_section(whose, stems)}/{figure}")
    elif whose in stems.values():
        names.append(f"2 {whose}/{figure}")
    return names


def _section(source: str, stems: Mapping[str, str]) -> str:
    """A stem; beside another source of the same stem, both."""
    stem = stems[source]
    return stem if _count(stems.values(), stem) == 1 else f"{stem} {source.replace('/', ' ')}"


def _count(values: Iterable[str], wanted: str) -> int:
    return sum(value == wanted for value in values)
