"""What is measured while training, of every stem by itself: k-NN, held-out loss, what the layers do, pictures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from d2v_scale.evaluation.held_out import HeldOutSet
from d2v_scale.evaluation.online import OnlineEvaluation
from d2v_scale.evaluation.samples import named_for
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.plots.gallery import Gallery
from d2v_scale.recipe import Recipe
from d2v_scale.teacher.sharded import EmaTeacher


@dataclass(frozen=True)
class _OfStem:
    stem: str
    online: OnlineEvaluation | None
    held_out: HeldOutSet | None


class Evaluation:
    """The evaluation sets of all stems, which every rank keeps in memory."""

    def __init__(self, recipe: Recipe, student: StudentEngine, teacher: EmaTeacher) -> None:
        """On the shards that the recipe names, which are decoded once, and where it names none on a few samples of the
        first training shard that a stem reads. Collective: all ranks must call; all read the same, or raise the same
        DataError."""
        self._recipe = recipe
        trained = {stem for source in recipe.data.sources for stem in source.stems}
        self._stems: list[_OfStem] = []
        for stem in recipe.model.modalities:
            named = named_for(recipe, stem)
            online = OnlineEvaluation.of(recipe, stem, named, student, teacher)
            # How a stem that no source is read for would be masked, nobody has checked.
            held_out = HeldOutSet.of(recipe, stem, named, student, teacher) if stem in trained else None
            self._stems.append(_OfStem(stem, online, held_out))

    def figures(self) -> dict[str, float]:
        """All figures for the record, of several stems as FIGURE/STEM. Collective: all ranks must call; all get the
        same."""
        figures: dict[str, float] = {}
        for one in self._stems:
            sets = (one.online, one.held_out)
            found = {name: value for part in sets if part is not None for name, value in part.figures().items()}
            figures |= found if len(self._stems) == 1 else under_stem(found, one.stem)
        return figures

    def galleries(self, step: int) -> Iterator[Gallery]:
        """What pictures are drawn from, of each stem that there are samples of. Collective: all ranks must call."""
        return (one.online.gallery(self._recipe, step) for one in self._stems if one.online is not None)


def under_stem(figures: Mapping[str, float], stem: str) -> dict[str, float]:
    """The same figures with the stem in their names: `cka/layer_01` as `cka/STEM/layer_01`."""
    found = {}
    for name, value in figures.items():
        figure, slash, detail = name.partition("/")
        found[f"{figure}/{stem}{slash}{detail}"] = value
    return found
