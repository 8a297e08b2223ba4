"""A pair of modalities, measured layer by layer on held-out concepts, as it is and with its pairs shuffled."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from d2v_scale.alignment import measures
from d2v_scale.alignment.measures import Ridge, RidgeMap
from d2v_scale.data2vec.likeness import Kernel, debiased_cka

AT = (1, 5, 10)
"""Retrieval is reported among so many nearest."""
K = 10
"""And judged by these."""
MAPPED, SAME, MUTUAL, CKA = "mapped R@10", "same-space R@10", "mutual k-NN", "CKA"
MEASURES = (MAPPED, SAME, MUTUAL, CKA)
"""What a verdict is given on. In [0, 1]; the more alike the greater."""
SMALLEST_CATEGORY = 2 * K
"""Concepts of a category that are shuffled among themselves: among fewer R@10 could not tell them apart."""
_LAYER_CHOICE = 2000
"""Training concepts by which a layer is chosen."""


@dataclass(kw_only=True)
class Features:
    """Of both modalities on both sides. Row n of x and of y is of one concept."""

    train_x_nd: Tensor
    train_y_ne: Tensor
    test_x_nd: Tensor
    test_y_ne: Tensor

    def without(self, lengths: "Features") -> "Features":
        """What is left when each modality's own length is regressed out."""
        train_x_nd, test_x_nd = measures.without(lengths.train_x_nd, self.train_x_nd, lengths.test_x_nd, self.test_x_nd)
        train_y_ne, test_y_ne = measures.without(lengths.train_y_ne, self.train_y_ne, lengths.test_y_ne, self.test_y_ne)
        return Features(train_x_nd=train_x_nd, train_y_ne=train_y_ne, test_x_nd=test_x_nd, test_y_ne=test_y_ne)

    def principal(self, most: int) -> "Features":
        """Wide ones as their first principal components."""
        train_x_nd, test_x_nd = measures.principal(self.train_x_nd, self.test_x_nd, most)
        train_y_ne, test_y_ne = measures.principal(self.train_y_ne, self.test_y_ne, most)
        return Features(train_x_nd=train_x_nd, train_y_ne=train_y_ne, test_x_nd=test_x_nd, test_y_ne=test_y_ne)


@dataclass
class Order:
    """Who is paired with whom: row n of x with row `train_n[n]`, on the other side `test_n[n]`, of y."""

    train_n: Tensor
    test_n: Tensor


@dataclass
class LayerScores:
    """What a pair of layers is worth."""

    values: dict[str, Tensor]
    """By measure, held-out: float64 (N,), the score is the mean."""
    on_training: dict[str, float] = field(default_factory=dict)
    """By measure, on training concepts, of maps that are fitted without each: what a layer is chosen by."""
    retrieval: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Space to `R@k` to direction (`x to y`, `y to x`)."""
    gap: float | None = None

    def score(self, measure: str) -> float | None:
        """The score, or None where there is none."""
        return float(self.values[measure].mean()) if measure in self.values else None


class PairOfLayers:
    """Two layers' features, decomposed once for the true pairs and any shuffled ones."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self._x, self._y = Ridge(features.train_x_nd), Ridge(features.train_y_ne)
        test = features.test_x_nd, features.test_y_ne
        self._neighbours = [measures.neighbours(one) for one in test]
        self._kernels = [Kernel.of(one) for one in test]
        self.same_space = features.train_x_nd.shape[1] == features.train_y_ne.shape[1]

    def mapped(self) -> tuple[Tensor, Tensor]:
        """Held-out features (N, E) of both, x mapped into the space of y, about the training mean: to be looked at."""
        forth = self._x.fit(self.features.train_y_ne)
        return forth(self.features.test_x_nd), self.features.test_y_ne.double() - forth.y_mean_e

    def scores(self) -> LayerScores:
        """Measure them."""
        given = self.features
        train_x_nd, train_y_ne, test_x_nd, test_y_ne = (
            given.train_x_nd,
            given.train_y_ne,
            given.test_x_nd,
            given.test_y_ne,
        )
        forth, back = self._x.fit(train_y_ne), self._y.fit(train_x_nd)
        spaces = {"mapped": _mapped_ranks(forth, back, test_x_nd, test_y_ne)}
        if self.same_space:
            spaces["same"] = measures.ranks(test_x_nd, test_y_ne), measures.ranks(test_y_ne, test_x_nd)
            centred = test_x_nd.double() - train_x_nd.double().mean(0), test_y_ne.double() - train_y_ne.double().mean(0)
            spaces["centred"] = measures.ranks(*centred), measures.ranks(*centred[::-1])
        values = {MAPPED: _recall(spaces["mapped"], K)}
        values |= {SAME: _recall(spaces["same"], K)} if self.same_space else {}
        values |= {MUTUAL: measures.shared(*self._neighbours), CKA: self._kernels[0].cka(self._kernels[1])}
        return LayerScores(
            values,
            self._on_training(forth, back),
            {name: _at_all(ranks) for name, ranks in spaces.items()},
            measures.modality_gap(test_x_nd, test_y_ne) if self.same_space else None,
        )

    def _on_training(self, forth: RidgeMap, back: RidgeMap) -> dict[str, float]:
        """See `LayerScores.on_training`."""
        some = slice(None, _LAYER_CHOICE)
        x_nd, y_ne = self.features.train_x_nd[some], self.features.train_y_ne[some]
        left_out = (
            measures.ranks(forth.left_out_ne[some] - forth.y_mean_e, y_ne.double() - forth.y_mean_e),
            measures.ranks(back.left_out_ne[some] - back.y_mean_e, x_nd.double() - back.y_mean_e),
        )
        found = {MAPPED: float(_recall(left_out, K).mean())}
        found |= {SAME: float(measures.recall(x_nd, y_ne, K).mean())} if self.same_space else {}
        found[MUTUAL] = float(measures.mutual_neighbours(x_nd, y_ne).mean())
        found[CKA] = float(debiased_cka(x_nd, y_ne).mean())
        return found

    def shuffled(self, measure: str, order: "Order") -> Tensor:
        """(N,) of one measure, with other pairs on both sides."""
        given, other = self.features, order.test_n
        if measure == MUTUAL:
            return measures.shared(self._neighbours[0], self._neighbours[1][other][:, other])
        if measure == CKA:
            return self._kernels[0].cka(self._kernels[1].reordered(other))
        test_y_ne = given.test_y_ne[other]
        if measure == SAME:
            return measures.recall(given.test_x_nd, test_y_ne, K)
        assert measure == MAPPED
        forth = self._x.fit(given.train_y_ne[order.train_n])
        back = self._y.fit(given.train_x_nd[order.train_n.argsort()])
        return _recall(_mapped_ranks(forth, back, given.test_x_nd, test_y_ne), K)


def _mapped_ranks(forth: RidgeMap, back: RidgeMap, test_x_nd: Tensor, test_y_ne: Tensor) -> tuple[Tensor, Tensor]:
    return (
        measures.ranks(forth(test_x_nd), test_y_ne.double() - forth.y_mean_e),
        measures.ranks(back(test_y_ne), test_x_nd.double() - back.y_mean_e),
    )


def _recall(both: tuple[Tensor, Tensor], k: int) -> Tensor:
    return ((both[0] <= k).double() + (both[1] <= k).double()) / 2


def _at_all(both: tuple[Tensor, Tensor]) -> dict[str, dict[str, float]]:
    names = ("x to y", "y to x")
    return {
        f"R@{k}": {name: float((ranks <= k).double().mean()) for name, ranks in zip(names, both, strict=True)}
        for k in AT
    }


@dataclass
class PairScores:
    """One pair of modalities of one model, all layers."""

    layers: list[LayerScores]
    chosen: dict[str, int]
    """By measure, the layer (from 0) that does best on training concepts."""

    def values(self, measure: str) -> Tensor:
        """(N,) of the chosen layer."""
        return self.layers[self.chosen[measure]].values[measure]


def scored(layers: Sequence[PairOfLayers]) -> PairScores:
    """Measure all layers, and choose one for each measure."""
    found = [layer.scores() for layer in layers]
    names = [name for name in MEASURES if name in found[0].values]
    chosen = {
        name: max(range(len(found)), key=lambda number: (found[number].on_training[name], number)) for name in names
    }
    return PairScores(found, chosen)


def shuffled(layers: Sequence[PairOfLayers], chosen: dict[str, int], orders: Sequence[Order]) -> dict[str, Tensor]:
    """By measure (P, N): the layers that were chosen with the true pairs, in P other orders."""
    return {
        name: torch.stack([layers[number].shuffled(name, order) for order in orders]) for name, number in chosen.items()
    }


def matched(depth_x: int, depth_y: int) -> list[tuple[int, int]]:
    """Layers of two encoders at the same share of their depths, as many as the deeper one has."""
    deeper = max(depth_x, depth_y)
    return [(-(-(n + 1) * depth_x // deeper) - 1, -(-(n + 1) * depth_y // deeper) - 1) for n in range(deeper)]


def any_order(train: int, test: int, generator: torch.Generator) -> Order:
    """Pairs drawn by chance, on both sides."""
    return Order(torch.randperm(train, generator=generator), torch.randperm(test, generator=generator))


def order_within(train: Sequence[str | None], test: Sequence[str | None], generator: torch.Generator) -> Order:
    """Pairs drawn by chance within categories; nobody keeps its own partner where another can be had."""
    return Order(_within(train, generator), _within(test, generator))


def large_categories(categories: Sequence[str | None]) -> dict[str, int]:
    """Those that are shuffled by themselves, and how many concepts each has. All others are shuffled together."""
    counts = Counter(name for name in categories if name is not None)
    return {name: count for name, count in counts.items() if count >= SMALLEST_CATEGORY}


def _within(categories: Sequence[str | None], generator: torch.Generator) -> Tensor:
    """A permutation (N,) that moves every concept to another of its category."""
    large = large_categories(categories)
    groups: dict[str | None, list[int]] = {}
    for number, name in enumerate(categories):
        groups.setdefault(name if name in large else None, []).append(number)
    order = torch.arange(len(categories))
    for members in groups.values():
        turned = torch.tensor(members)[torch.randperm(len(members), generator=generator)]
        order[turned] = turned.roll(1)
    return order
