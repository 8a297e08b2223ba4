"""Who trains in a round, and what takes the place of what. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What all launchers of a job do in a round: there is one for each number, and nobody changes it."""

    number: int
    """From 1."""
    active: tuple[str, ...] = ()
    """The nodes that train, in the order of their ranks."""
    excluded: Mapping[str, str] = field(default_factory=dict)
    """Nodes that do not take part any more, and why."""
    further: tuple[str, ...] = ()
    """Arguments of the training program beside those that were given."""
    end: int | None = None
    """The exit code of all launchers; None: there is a round."""
    why: str = ""
    """Why there is this round, or none, in words."""
    time: float = 0.0
    """When it was decided (Unix seconds)."""
    attempts: tuple[Mapping[str, Any], ...] = ()
    """Attempts of this job since the newest checkpoint, oldest first, as in attempts.jsonl."""
    struck: Mapping[str, int] = field(default_factory=dict)
    """How often the ranks of a node were the first to fail in a way that its hardware may be to blame for."""


def replaced(
    nodes: Sequence[str], active: Sequence[str], excluded: Collection[str], unfit: Collection[str] = ()
) -> tuple[str, ...] | None:
    """`active` with the next nodes of `nodes` in the places of those that are excluded; None where too few are left.

    A node that stays keeps its place, and so its ranks. `unfit`: nodes that cannot take a place now.
    """
    spares = iter([node for node in nodes if node not in active and node not in excluded and node not in unfit])
    found = [next(spares, None) if node in excluded else node for node in active]
    places = tuple(node for node in found if node is not None)
    return places if len(places) == len(active) else None
