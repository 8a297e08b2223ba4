"""What a row of tools/evidence_joint.py is scored by: probes of every stem, and retrieval between every two."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evidence_joint_sets import JointSet

if TYPE_CHECKING:
    from torch import Tensor

    from d2v_scale.alignment.features import Means
    from d2v_scale.alignment.scoring import Features

NEAREST = 10


def scores_of(data: JointSet, encoders: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """By stem k-NN and linear probe, by pair of stems what is retrieved, with its chance. Fractions."""
    import torch

    from d2v_scale.alignment.concepts import read_set
    from d2v_scale.alignment.features import StemSamples, averaged, encoded, kind_of
    from d2v_scale.alignment.scoring import Features
    from d2v_scale.evaluation.features import mean_over_layers
    from d2v_scale.evaluation.probes import score

    made: dict[str, list[Means]] = {}
    sets = [read_set(index, ["image", "recording", "text"], data.concept, data.label) for index in data.both]
    for stem, encoder in encoders.items():
        kind = kind_of(encoder, stem)
        decoder = kind.build_decoder(encoder.recipe.data, sets[0].tokenizer)
        made[stem] = [averaged(StemSamples(one, kind, decoder, None, 64), [encoded(encoder)])[0] for one in sets]
    classes = sorted({place.category or "" for one in sets for place in one.places})
    labels = []
    for one in sets:
        category = {place.concept: place.category or "" for place in one.places}
        labels.append(torch.tensor([classes.index(category[name]) for name in one.concepts]))
    stems = {}
    for stem, means in made.items():
        x, y = (mean_over_layers(side.layers_lnd[:, side.present_n]) for side in means)
        stems[stem] = score(x, labels[0][means[0].present_n], y, labels[1][means[1].present_n])
    pairs = {}
    for a, b in itertools.combinations(made, 2):
        train_n, test_n = (made[a][side].present_n & made[b][side].present_n for side in (0, 1))
        layers = [
            Features(
                train_x_nd=made[a][0].layers_lnd[layer, train_n],
                train_y_ne=made[b][0].layers_lnd[layer, train_n],
                test_x_nd=made[a][1].layers_lnd[layer, test_n],
                test_y_ne=made[b][1].layers_lnd[layer, test_n],
            )
            for layer in range(len(made[a][0].layers_lnd))
        ]
        own = (labels[0][train_n], labels[1][test_n])
        pairs[f"{a} - {b}"] = of_classes(layers, *own) if data.interchangeable else of_partners(layers)
    return stems, pairs


def retrieval_of(data: JointSet) -> str:
    """What pairs are scored by."""
    return f"{'P' if data.interchangeable else 'R'}@{NEAREST}"


def of_partners(layers: "Sequence[Features]") -> dict[str, float]:
    """R@10 of held-out concepts, at the layer that is chosen on training concepts."""
    from d2v_scale.alignment.scoring import MAPPED, SAME, PairOfLayers, scored

    found = scored([PairOfLayers(layer) for layer in layers])
    return {
        "mapped": float(found.values(MAPPED).mean()),
        "same": float(found.values(SAME).mean()),
        "chance": min(1.0, NEAREST / len(layers[0].test_x_nd)),
    }


def of_classes(layers: "Sequence[Features]", train_labels_n: "Tensor", test_labels_n: "Tensor") -> dict[str, float]:
    """P@10: which share of a held-out sample's ten nearest of the other modality is of its class, mean of both
    directions, at the layer that is chosen on training samples (by maps that are fitted without each).

    Where any sample of a class may stand for another, which one it is paired with says nothing, and one that is found
    by its class alone stands behind all that are."""
    from d2v_scale.alignment.measures import Ridge

    best = {"mapped": (-1.0, 0.0), "same": (-1.0, 0.0)}  # on training samples, held-out
    for one in layers:
        forth, back = Ridge(one.train_x_nd).fit(one.train_y_ne), Ridge(one.train_y_ne).fit(one.train_x_nd)
        x_nd, y_ne = one.train_x_nd.double() - back.y_mean_e, one.train_y_ne.double() - forth.y_mean_e
        test_x_nd, test_y_ne = one.test_x_nd.double() - back.y_mean_e, one.test_y_ne.double() - forth.y_mean_e
        for way, train, test in (
            (
                "mapped",
                [(forth.left_out_ne - forth.y_mean_e, y_ne), (back.left_out_ne - back.y_mean_e, x_nd)],
                [(forth(one.test_x_nd), test_y_ne), (back(one.test_y_ne), test_x_nd)],
            ),
            (
                "same",
                [(one.train_x_nd, one.train_y_ne), (one.train_y_ne, one.train_x_nd)],
                [(one.test_x_nd, one.test_y_ne), (one.test_y_ne, one.test_x_nd)],
            ),
        ):
            on_training = sum(precision(*both, train_labels_n) for both in train) / 2
            if on_training >= best[way][0]:
                best[way] = on_training, sum(precision(*both, test_labels_n) for both in test) / 2
    alike_nn = test_labels_n[:, None] == test_labels_n
    return {way: held_out for way, (_, held_out) in best.items()} | {"chance": float(alike_nn.double().mean())}


def precision(queries_nd: "Tensor", found_nd: "Tensor", labels_n: "Tensor") -> float:
    """Which share of the ten nearest is of the query's class; of ties at the tenth place each counts in part."""
    from d2v_scale.alignment.measures import cosines, nearest

    near_nn = nearest(cosines(queries_nd, found_nd), NEAREST)
    return float((near_nn * (labels_n[:, None] == labels_n)).sum(dim=1).mean() / near_nn.sum(dim=1).mean())
