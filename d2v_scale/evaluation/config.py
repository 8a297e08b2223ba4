"""What is measured during pretraining to see whether the representations improve."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class EvaluationConfig:
    """k-nearest-neighbour accuracy of the teacher's features on a small labelled split, and what both networks make of
    masked samples that are not trained on."""

    train: str | None = None
    """Labelled shards that neighbours are taken from; null: no k-NN."""
    test: str | None = None
    """Labelled shards whose labels are guessed."""
    held_out: str | None = None
    """Shards, with labels or without, for the masked loss, for what the layers do with them, and, where `test` is null,
    for pictures; null: `test`. With neither, a few samples of the first training shard are looked at."""
    every: int = 0
    """Steps between evaluations; 0: only before the first step and after the last."""
    batch_size: int = 32
    """Samples of a forward pass; where they are masked, these many rows (samples x clones)."""
    k: int = 20
    """Neighbours."""
    layers: list[int] = field(default_factory=lambda: [-1, -2, -3, -4])
    """Main blocks whose mean-pooled outputs are averaged; negative numbers count from the last."""
    max_train: int = 5000
    """Samples to take neighbours from."""
    max_test: int = 1000
    """Samples to classify."""
    max_masked: int = 256
    """Samples of `held_out` to look at, always with the same masks."""
