import math

import pytest
import torch

from d2v_scale.batch import Batch
from d2v_scale.evaluation.features import extract
from d2v_scale.evaluation.knn import knn, nearest, whitened, whitened_knn
from d2v_scale.evaluation.probes import linear_probe, weighted_layers_probe
from d2v_scale.model.pooling import mean_over_positions


def blobs(count: int, classes: int, width: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return centres[labels] + spread * torch.randn(count, width, generator=generator), labels


def test_knn_is_right_on_separated_blobs_and_at_chance_on_noise() -> None:
    x, y = blobs(400, 4, 16, 0.1, 0)
    queries, labels = blobs(100, 4, 16, 0.1, 1)
    assert knn(x, y, queries, labels) == 1.0
    noise = torch.randn(1000, 16, generator=torch.Generator().manual_seed(3))
    assert knn(noise[:600], torch.arange(600) % 4, noise[600:], torch.arange(400) % 4) == pytest.approx(0.25, abs=0.08)


def test_knn_agrees_with_sklearn_on_cosine_neighbours() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    x, y = blobs(300, 5, 8, 2.0, 0)
    queries, labels = blobs(200, 5, 8, 2.0, 1)
    weights = lambda distance: __import__("numpy").exp((1 - distance) / 0.07)  # noqa: E731
    theirs = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=weights).fit(x, y)
    assert knn(x, y, queries, labels) == pytest.approx(theirs.score(queries, labels), abs=0.006)


def test_knn_ignores_length_and_does_not_overflow() -> None:
    x, y = blobs(100, 4, 16, 0.1, 0)
    assert knn(x * 1e6, y, x[:20] * 1e-6, y[:20], temperature=1e-4) == 1.0
    assert knn(x[:5], y[:5], x[:5], y[:5], k=20) == 1.0  # fewer examples than k


def test_whitened_neighbours_do_not_depend_on_how_features_are_mixed() -> None:
    generator = torch.Generator().manual_seed(0)
    x, queries = torch.randn(200, 8, generator=generator), torch.randn(50, 8, generator=generator)
    mixing, shift = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    bank, asked = whitened(x, queries, shrinkage=0)
    mixed_bank, mixed_asked = whitened(x @ mixing + shift, queries @ mixing + shift, shrinkage=0)
    assert torch.equal(nearest(bank, asked, 5)[1], nearest(mixed_bank, mixed_asked, 5)[1])
    torch.testing.assert_close(bank.T @ bank / 200, torch.eye(8), atol=1e-4, rtol=0)
    constant, _ = whitened(torch.ones(20, 4), torch.ones(3, 4))
    assert constant.isfinite().all()


def test_the_accuracy_of_features_that_are_not_finite_is_no_number_and_no_traceback() -> None:
    """In a run it is a figure as others are: such a one ends no training."""
    x, y = blobs(100, 4, 16, 0.1, 0)
    assert whitened_knn(x, y, x[:20], y[:20]) == 1.0
    broken = x.clone()
    broken[3, 5] = float("inf")
    assert math.isnan(whitened_knn(broken, y, x[:20], y[:20]))
    assert math.isnan(whitened_knn(x, y, broken[:20], y[:20]))


def test_nearest_is_the_same_for_any_chunk() -> None:
    x = torch.randn(50, 8)
    assert torch.equal(nearest(x, x, 5, chunk=7)[1], nearest(x, x, 5)[1])
    assert torch.equal(nearest(x, x, 1)[1][:, 0], torch.arange(50))


def test_linear_probe_learns_and_chooses_the_penalty_without_the_queries() -> None:
    x, y = blobs(300, 3, 10, 1.0, 0)
    queries, labels = blobs(300, 3, 10, 1.0, 1)
    result = linear_probe(x, y, queries, labels)
    assert result.accuracy > 0.9
    assert linear_probe(x, y, queries, labels.roll(1)).penalty == result.penalty


def test_linear_probe_survives_a_class_with_one_example() -> None:
    x, y = blobs(100, 2, 4, 0.1, 0)
    y[0] = 2
    assert linear_probe(x, y, x, y).accuracy > 0.9


def test_weighted_probe_finds_the_layer_that_knows() -> None:
    x, y = blobs(300, 3, 10, 0.5, 0)
    queries, labels = blobs(200, 3, 10, 0.5, 1)
    noise = torch.randn(4, 300, 10), torch.randn(4, 200, 10)
    layers, held = (
        noise[0].index_copy(0, torch.tensor([2]), x[None]),
        noise[1].index_copy(0, torch.tensor([2]), queries[None]),
    )
    result = weighted_layers_probe(layers, y, held, labels)
    assert result.accuracy > 0.9
    assert result.layer_weights is not None
    assert max(range(4), key=result.layer_weights.__getitem__) == 2


def test_extract_pools_valid_positions_and_keeps_order() -> None:
    def batch(first: int) -> Batch:
        inputs = torch.arange(first, first + 4).reshape(2, 2).float()
        return Batch(
            modality="text",
            inputs=inputs,
            valid=torch.tensor([[True, False], [True, True]]),
            masked_rt=torch.zeros(2, 2, dtype=torch.bool),
            sample_ids=torch.tensor([first, first + 1]),
            keys=(f"k{first}", f"k{first + 1}"),
        )

    batches = [(batch(0), torch.tensor([1, 0])), (batch(10), torch.tensor([2, 1]))]
    features = extract(lambda b: [b.inputs[..., None], 2 * b.inputs[..., None]], batches, lambda b: b.valid)
    assert features.layers_lnd[0, :, 0].tolist() == [0.0, 2.5, 10.0, 12.5]
    assert features.layers_lnd[1, :, 0].tolist() == [0.0, 5.0, 20.0, 25.0]
    assert features.labels_n.tolist() == [1, 0, 2, 1]
    assert features.keys == ["k0", "k1", "k10", "k11"]


def test_mean_over_no_valid_position_is_zero() -> None:
    assert mean_over_positions(torch.ones(1, 3, 2), torch.zeros(1, 3, dtype=torch.bool)).abs().sum() == 0
