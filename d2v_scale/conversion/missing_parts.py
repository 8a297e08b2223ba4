"""Rows without a part that others have: how many become samples of what they have, and what no row has."""

from collections.abc import Mapping
from pathlib import Path

from d2v_scale.errors import DataError


def tell_of_missing(table: Path, rows: int, lacking: Mapping[str, int]) -> None:
    """Say how many of the rows go on without which part. Raises DataError for a part that no row has."""
    if empty := [part for part, count in lacking.items() if count == rows and rows]:
        raise DataError(
            f"No row of {table} has {' or '.join(empty)}.",
            f"Fill the column, or name another one with --{empty[0]} COLUMN.",
        )
    if any(lacking.values()):
        said = ", ".join(f"{count} have no {part}" for part, count in lacking.items() if count)
        print(
            f"of {rows} rows {said}: they become samples of what they have, and where {' or '.join(lacking)} is "
            "read alone, count as lost (--complete leaves such rows out)"
        )
