"""What is measured during pretraining to see whether the representations improve."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class EvaluationSet:
    """Shards that one stem is measured on."""

    train: str | None = None
    """Labelled shards that neighbours are taken from; null: no k-NN."""
    test: str | None = None
    """Labelled shards whose labels are guessed."""
    held_out: str | None = None
    """Shards for the masked loss; null: `test`. With neither, a few samples of the stem's first training shard."""

    @property
    def shards(self) -> list[str]:
        """All that are named."""
        return [shards for shards in (self.train, self.test, self.held_out) if shards]


@dataclass(kw_only=True)
class EvaluationConfig:
    """k-nearest-neighbour accuracy of the teacher's features on a small labelled split, and what both networks make of
    masked samples that are not trained on: of every stem by itself."""

    train: str | None = None
    """Labelled shards that neighbours are taken from; null: no k-NN."""
    test: str | None = None
    """Labelled shards whose labels are guessed."""
    held_out: str | None = None
    """Shards, with labels or without, for the masked loss, for what the layers do with them, and, where `test` is null,
    for pictures; null: `test`. With neither, a few samples of the first training shard are looked at."""
    sets: dict[str, EvaluationSet] = field(default_factory=dict)
    """`train`, `test` and `held_out` of single stems, by their names. Stems that are not named have those above, as far
    as these hold what a stem reads."""
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

    def of(self, stem: str) -> EvaluationSet:
        """What is named for a stem."""
        return self.sets.get(stem) or self._of_all

    @property
    def _of_all(self) -> EvaluationSet:
        return EvaluationSet(train=self.train, test=self.test, held_out=self.held_out)

    @property
    def shards(self) -> list[str]:
        """All that are named, for any stem."""
        return [shards for one in (self._of_all, *self.sets.values()) for shards in one.shards]
