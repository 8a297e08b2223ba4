"""How often a run is saved, and what is kept."""

from dataclasses import dataclass, field

GENERATIONS = 2
"""Of copies in memory: the last whole one, and the one that is being written."""


@dataclass(kw_only=True)
class MemoryConfig:
    """Copies of the state in the memory of nodes, which a restart goes on from without the file system.

    Every rank's shard stays in its own node's memory file system and in that of the next node.
    """

    every: int = 0
    """Steps between copies, and so the most that a lost node costs; 0: none are made."""
    dir: str = "auto"
    """A memory file system of every node; `$NAME` is taken from the environment of each process. `auto`: /dev/shm."""

    def due(self, step: int) -> bool:
        """Whether a copy of this step is made."""
        return self.every > 0 and step % self.every == 0


@dataclass(kw_only=True)
class CheckpointConfig:
    """How often to save and what to keep."""

    every: int = 1000
    """Steps between checkpoints; 0: none in between. The step a run ends or is stopped at is always saved."""
    keep_last: int = 2
    """How many of the newest to keep."""
    keep_every: int = 0
    """Also keep those whose step is a multiple of this; 0 keeps none."""
    peer_timeout: float = 1800.0
    """Seconds to wait for the slowest rank's file before a save counts as failed."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def due(self, step: int) -> bool:
        """Whether this step is saved because of its number."""
        return self.every > 0 and step % self.every == 0
