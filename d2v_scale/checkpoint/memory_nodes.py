"""Who of a run's ranks share a node, who holds whose shard, and how they tell each other so."""

import os
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from d2v_scale.checkpoint.config import GENERATIONS
from d2v_scale.checkpoint.memory_wire import Address
from d2v_scale.programs.machine import this_machine, this_network


@dataclass(frozen=True)
class Seat:
    """Where a rank runs, as it finds out by itself."""

    machine: str
    name: str
    """Of the node; on one machine there may be several that only have a name."""
    group: int
    """Of ranks that a launcher started together."""
    network: str = ""
    """What 127.0.0.1 means: the machine, or its container's part of it."""

    @staticmethod
    def find(environment: Mapping[str, str] = os.environ) -> "Seat":
        """Of this process."""
        host = socket.gethostname()
        ranks = int(environment.get("LOCAL_WORLD_SIZE", "0"))
        group = int(environment.get("RANK", "0")) // ranks if ranks else 0
        return Seat(this_machine(), environment.get("SLURMD_NODENAME", host), group, this_network())


@dataclass(frozen=True)
class Member:
    """One rank, as all know it."""

    machine: str
    node: str
    """What dies together: a node, or where all are on one a group of its ranks, as the launcher divides them."""
    address: Address


def nodes_of(seats: Sequence[Seat]) -> list[str]:
    """By rank the name of what dies together."""
    if len({seat.name for seat in seats}) > 1:
        # A launcher may spread consecutive ranks over machines: groups of them are no nodes then.
        return [seat.name for seat in seats]
    return [f"{seat.name}, group {seat.group}" for seat in seats]


def peers(nodes: Sequence[str]) -> list[int | None]:
    """By rank the one that holds its shard, at the same place of the next node; None with one node. `nodes`: by
    rank."""
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    if len(ranks) == 1:
        return [None] * len(nodes)
    found: list[int | None] = [None] * len(nodes)
    groups = list(ranks.values())
    for group, following in zip(groups, [*groups[1:], groups[0]], strict=True):
        for place, rank in enumerate(group):
            found[rank] = following[place % len(following)]
    return found


def place_of(rank: int, nodes: Sequence[str]) -> int:
    """Which of its node's ranks it is."""
    return nodes[:rank].count(nodes[rank])


def own_address(alone: bool) -> str:
    """Where others reach this process. `alone`: all are in this network of this machine."""
    if alone:
        return "127.0.0.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: the system says from which of its addresses it would.
            probe.connect((os.environ["MASTER_ADDR"], 9))
            found: str = probe.getsockname()[0]
        except (KeyError, OSError):
            found = ""
    # The first node may know itself by a name that means itself only.
    return socket.gethostname() if not found or found.startswith("127.") else found


@dataclass(frozen=True)
class Room:
    """What a rank needs in memory file systems, and what its own has."""

    shard: int
    """Bytes of a copy of this rank's state."""
    file_system: int
    path: str
    free: int
    already: int
    """Bytes of earlier copies, which are replaced."""

    @staticmethod
    def find(shard: int, path: Path, already: int) -> "Room":
        """At a folder."""
        there = os.statvfs(path)
        return Room(shard, path.stat().st_dev, str(path), there.f_bavail * there.f_frsize, already)


def lack_of_room(members: Sequence[Member], rooms: Sequence[Room]) -> str:
    """Why some node has not the room for two generations of its copies, in words; empty if all have. Both by rank."""
    holders = peers([member.node for member in members])
    wanted: dict[tuple[str, int], int] = {}
    free: dict[tuple[str, int], int] = {}
    replaced: dict[tuple[str, str], tuple[tuple[str, int], int]] = {}
    for rank, room in enumerate(rooms):
        for holder in (rank, holders[rank]):
            if holder is not None:
                system = (members[holder].machine, rooms[holder].file_system)
                wanted[system] = wanted.get(system, 0) + GENERATIONS * room.shard
        system = (members[rank].machine, room.file_system)
        free[system] = room.free
        replaced[members[rank].machine, room.path] = system, room.already
    for system, already in replaced.values():
        free[system] += already
    for rank, room in enumerate(rooms):
        system = (members[rank].machine, room.file_system)
        if wanted[system] > free[system]:
            return (
                f"{room.path} of {members[rank].node} has {free[system] / 1e9:.3g} GB free, and two generations of "
                f"copies take {wanted[system] / 1e9:.3g} GB there"
            )
    return ""


def place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(mine: Any) -> list[Any]:
    """What every rank hands in, by rank. Collective."""
    everyone = [mine] * place()[1]
    if len(everyone) > 1:
        dist.all_gather_object(everyone, mine)
    return everyone


def gather_on_rank_0(mine: Any) -> list[Any]:
    """The same on rank 0; others get an empty list. Collective."""
    rank, world_size = place()
    if world_size == 1:
        return [mine]
    everyone: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(mine, everyone)
    return everyone or []


def from_rank_0(mine: Any) -> Any:
    """What rank 0 hands in. Collective."""
    said = [mine]
    if place()[1] > 1:
        dist.broadcast_object_list(said, src=0)
    return said[0]


def in_words(ranks: Collection[int]) -> str:
    """Some of many."""
    first = ", ".join(map(str, sorted(ranks)[:8]))
    return first + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
