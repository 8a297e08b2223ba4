"""How many files a rank may have open, and how many its world needs: every peer is a socket.

Torch-free: it is asked before the slow imports.
"""

import resource

_MOST = 1 << 20
"""What a soft limit is raised to where the hard one is unlimited: some libraries walk through all of it."""
_OWN, _OWN_OF_RANK_0 = 12, 20
_SHARDS_AND_WORKERS = 64
"""For shards that stay open, pipes of data workers and logs."""


def needed(rank: int, world_size: int) -> int:
    """Open files of a rank: a socket to each peer in the group that agrees on stops, and on rank 0 one to each client
    of the store that the world meets in (counted at 16 and 64 ranks: 12 + W, on rank 0 20 + 2 W), and its data."""
    sockets = _OWN_OF_RANK_0 + 2 * world_size if rank == 0 else _OWN + world_size
    return sockets + _SHARDS_AND_WORKERS


def raise_limit() -> int:
    """Raise this process's soft limit to the hard one; returns what is allowed now. Never lowers it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return _MOST if soft == resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def problem(rank: int, world_size: int) -> str:
    """Why this process cannot hold its place in the world, or an empty string. Raises its soft limit as far as goes."""
    wanted, allowed = needed(rank, world_size), raise_limit()
    if wanted <= allowed:
        return ""
    return f"rank {rank} of {world_size} needs {wanted} open files, the hard limit (ulimit -Hn) is {allowed}"
