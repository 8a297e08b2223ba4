"""How often a run is saved, and what is kept."""

from dataclasses import dataclass


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

    def due(self, step: int) -> bool:
        """Whether this step is saved because of its number."""
        return self.every > 0 and step % self.every == 0
