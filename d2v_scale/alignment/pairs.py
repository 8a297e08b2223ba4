"""One pair of stems, measured with all its controls, on features that are made."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2v_scale.alignment import scoring
from d2v_scale.alignment.concepts import ConceptSet, Split
from d2v_scale.alignment.features import Means
from d2v_scale.alignment.scoring import Features, PairOfLayers, PairScores

FEWEST_HELD_OUT = 50
FEWEST_TRAINING = 20
RAW_COMPONENTS = 256
SHUFFLES = 20
RANDOM, RAW, LENGTH = "random encoder", "raw features", "length alone"
SHUFFLED, WITHIN = "shuffled pairs", "shuffled within categories"
LENGTH_REMOVED = "length removed"

Both = dict[str, tuple[Means, Means]]
"""A stem's name to its features on the training and on the held-out side."""


@dataclass(kw_only=True)
class Sources:
    """Features of every stem, of all that is compared."""

    runs: list[Both]
    """By seed."""
    random: list[Both]
    raw: Both
    lengths: Both
    raw_names: dict[str, str]


@dataclass(kw_only=True)
class Pair:
    """One pair of stems, on the concepts that have both: what is measured, and what is needed to look at it."""

    x: str
    y: str
    train_concepts: list[str]
    test_concepts: list[str]
    train_categories: list[str | None]
    test_categories: list[str | None]
    runs: list[PairScores]
    random: list[PairScores]
    values: dict[str, Tensor]
    """By measure: (S, N) of the runs."""
    controls: dict[str, dict[str, Tensor]]
    """By control and measure: (R, N)."""
    without_length: dict[str, Tensor]
    """As `values`, length regressed out; empty where it does not vary."""
    features: list[Features]
    """Of the first run, by layer."""
    notes: list[str] = field(default_factory=list)


def measured_pair(found: Sources, split: Split, x: str, y: str) -> Pair | str:
    """A pair of stems, measured; what to say where there are too few concepts."""
    first = found.runs[0]
    train_n, test_n = ((first[x][side].present_n & first[y][side].present_n).nonzero()[:, 0] for side in (0, 1))
    if len(test_n) < FEWEST_HELD_OUT or len(train_n) < FEWEST_TRAINING:
        return f"{x} and {y} have {len(test_n)} held-out and {len(train_n)} training concepts"

    def layers(one: Both, most: int | None = None) -> list[Features]:
        depths = [len(one[stem][0].layers_lnd) for stem in (x, y)]
        made = [
            Features(
                train_x_nd=one[x][0].layers_lnd[i, train_n],
                train_y_ne=one[y][0].layers_lnd[j, train_n],
                test_x_nd=one[x][1].layers_lnd[i, test_n],
                test_y_ne=one[y][1].layers_lnd[j, test_n],
            )
            for i, j in scoring.matched(*depths)
        ]
        return made if most is None else [each.principal(most) for each in made]

    lengths = layers(found.lengths)[0]
    run_features, random_features = [layers(one) for one in found.runs], [layers(one) for one in found.random]
    train, test = (_named(side, rows) for side, rows in ((split.train, train_n), (split.test, test_n)))
    pair = Pair(
        x=x,
        y=y,
        train_concepts=[name for name, _ in train],
        test_concepts=[name for name, _ in test],
        train_categories=[category for _, category in train],
        test_categories=[category for _, category in test],
        runs=[],
        random=[],
        values={},
        controls={},
        without_length={},
        features=run_features[0],
    )
    generator = torch.Generator().manual_seed(0)
    orders = [scoring.any_order(len(train_n), len(test_n), generator) for _ in range(SHUFFLES)]
    pair.runs, pair.values, pair.controls[SHUFFLED], within = _measured(run_features, orders, pair, generator)
    if within:
        pair.controls[WITHIN] = within
    pair.random, pair.controls[RANDOM], _, _ = _measured(random_features, [], pair, generator)
    for name, features in ((RAW, layers(found.raw, RAW_COMPONENTS)), (LENGTH, [lengths])):
        _, pair.controls[name], _, _ = _measured([features], [], pair, generator)
    if bool((lengths.train_x_nd.std(dim=0) > 0).any() | (lengths.train_y_ne.std(dim=0) > 0).any()):
        without = [[one.without(lengths) for one in each] for each in run_features]
        plain = [[one.without(lengths) for one in each] for each in random_features]
        _, pair.without_length, shuffles, _ = _measured(without, orders, pair, generator)
        pair.controls[f"{LENGTH_REMOVED}, {SHUFFLED}"] = shuffles
        _, pair.controls[f"{LENGTH_REMOVED}, {RANDOM}"], _, _ = _measured(plain, [], pair, generator)
    else:
        pair.notes.append("length does not vary: it is not removed")
    return pair


def _named(side: ConceptSet, rows: Tensor) -> list[tuple[str, str | None]]:
    """Concepts and their categories, of some of a set's concepts."""
    category = {place.concept: place.category for place in reversed(side.places)}
    concepts = side.concepts
    return [(concepts[row], category[concepts[row]]) for row in rows.tolist()]


def _measured(
    features: Sequence[Sequence[Features]], orders: Sequence[scoring.Order], pair: Pair, generator: torch.Generator
) -> tuple[list[PairScores], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Several models: their scores, the values of the layers they choose, and these with pairs shuffled (a mean over
    models), at all and within categories. The last two are empty without `orders`, the last one where there are no
    categories."""
    scores, any_pairs, within_pairs = [], [], []
    within: list[scoring.Order] = []
    if orders and scoring.large_categories(pair.test_categories):
        within = [scoring.order_within(pair.train_categories, pair.test_categories, generator) for _ in range(SHUFFLES)]
    for each in features:
        layers = [PairOfLayers(one) for one in each]
        scores.append(scoring.scored(layers))
        if orders:
            any_pairs.append(scoring.shuffled(layers, scores[-1].chosen, orders))
        if within:
            within_pairs.append(scoring.shuffled(layers, scores[-1].chosen, within))
    names = list(scores[0].chosen)
    values = {name: torch.stack([one.values(name) for one in scores]) for name in names}
    means = [
        {name: torch.stack([one[name] for one in several]).mean(dim=0) for name in names} if several else {}
        for several in (any_pairs, within_pairs)
    ]
    return scores, values, means[0], means[1]
