"""What the random numbers of a forward pass are keyed by."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Draw:
    """What a forward's random numbers are keyed by, so that they do not depend on the world size.

    Ordinary dropout is not: it takes torch's global generator, which the loop seeds for every micro-batch.
    """

    seed: int
    step: int
    """Optimizer step, not micro-batch."""
