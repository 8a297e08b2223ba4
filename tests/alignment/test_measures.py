"""Known values, and what must change nothing."""

import pytest
import torch
from concept_shards import aligned
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.alignment import measures
from d2v_scale.alignment.measures import Ridge
from d2v_scale.data2vec.likeness import debiased_cka

N = 120


def turned(x_nd: torch.Tensor, seed: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    width = x_nd.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return scale * (x_nd.double() @ rotation)


def noise(n: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_turning_and_scaling_features_changes_nothing(seed: int, scale: float) -> None:
    x, y = aligned(60, 8, 1.0, seed)
    test_x, test_y = aligned(60, 8, 1.0, seed + 1)
    x2, test_x2 = turned(x, seed, scale), turned(test_x, seed, scale)
    torch.testing.assert_close(measures.mutual_neighbours(x2, y), measures.mutual_neighbours(x, y))
    torch.testing.assert_close(debiased_cka(x2, y), debiased_cka(x, y))
    first, second = Ridge(x).fit(y), Ridge(x2).fit(y)
    torch.testing.assert_close(second(test_x2), first(test_x), atol=1e-6, rtol=1e-6)
    back = Ridge(y).fit(x2)
    same = Ridge(y).fit(x)
    assert torch.equal(
        measures.ranks(back(test_y), test_x2 - back.y_mean_e), measures.ranks(same(test_y), test_x - same.y_mean_e)
    )
    # In the same space both are turned alike.
    assert torch.equal(measures.recall(x2, turned(y, seed, scale), 10), measures.recall(x, y, 10))


def test_equal_features_are_perfectly_aligned() -> None:
    x = noise(N, 16, 0)
    assert (measures.ranks(x, 3 * x) == 1).all()
    assert measures.mutual_neighbours(x, x).mean() == pytest.approx(1.0)
    assert debiased_cka(x, x).mean() == pytest.approx(1.0)
    assert measures.modality_gap(x, x) == 0.0


def test_independent_features_are_at_chance_however_wide() -> None:
    """The biased CKA of wide features is far above 0."""
    pairs = [(noise(N, 300, 2 * k), noise(N, 300, 2 * k + 1)) for k in range(20)]
    assert torch.stack([measures.recall(x, y, 10).mean() for x, y in pairs]).mean() == pytest.approx(10 / N, abs=0.02)
    mutual = torch.stack([measures.mutual_neighbours(x, y).mean() for x, y in pairs]).mean()
    assert mutual == pytest.approx(10 / (N - 1), abs=0.01)
    assert torch.stack([debiased_cka(x, y).mean() for x, y in pairs]).mean() == pytest.approx(0, abs=0.01)
    from d2v_scale.data2vec.statistics import linear_cka

    assert linear_cka(*pairs[0]) > 0.5


def test_features_that_tell_nothing_apart_find_nothing() -> None:
    """Ties count against: constant features had every partner at the first place."""
    same = torch.ones(N, 4)
    assert (measures.ranks(same, noise(N, 4, 0)) >= 1).all()
    assert (measures.ranks(noise(N, 4, 0), same) == N).all()
    assert (measures.ranks(same, same) == N).all()
    assert measures.recall(same, same, 10).sum() == 0
    assert measures.mutual_neighbours(same, same).mean() == pytest.approx(10 / (N - 1))
    assert debiased_cka(same, noise(N, 4, 0)).tolist() == [0.0] * N
    assert debiased_cka(1e4 + 0 * same, same).tolist() == [0.0] * N
    doubled = noise(N // 2, 4, 0).repeat(2, 1)  # two concepts of every caption
    assert (measures.ranks(doubled, doubled) == 2).all()


def test_a_ridge_map_finds_a_linear_relation_of_other_concepts() -> None:
    x, y = aligned(N, 8, 0.0, 1)
    test_x, test_y = aligned(N, 8, 0.0, 2)
    found = Ridge(x).fit(y)
    assert (measures.ranks(found(test_x), test_y - found.y_mean_e) == 1).all()
    assert measures.recall(test_x, test_y, 10).mean() < 0.3  # which are not alike as they are


def test_a_ridge_maps_left_out_values_are_those_of_maps_without_each_row() -> None:
    x, y = aligned(30, 6, 2.0, 3)
    whole = Ridge(x).fit(y)
    weights_r = None
    for row in (0, 7, 29):
        rest = torch.arange(30) != row
        # The same penalty, fitted without the row.
        x_rest, y_rest = x[rest].double(), y[rest].double()
        centred, mean = x_rest - x_rest.mean(0), y_rest.mean(0)
        penalty = _penalty_of(x, y)
        weights_r = torch.linalg.solve(centred.T @ centred + penalty * torch.eye(6), centred.T @ (y_rest - mean))
        expected = (x[row].double() - x_rest.mean(0)) @ weights_r + mean
        torch.testing.assert_close(whole.left_out_ne[row], expected, atol=1e-6, rtol=1e-4)


def _penalty_of(x: torch.Tensor, y: torch.Tensor) -> float:
    """What the weights of the whole map say."""
    centred = (x - x.mean(0)).double()
    weights = Ridge(x).fit(y).weights_de
    right = centred.T @ (y.double() - y.double().mean(0)) - centred.T @ centred @ weights
    return float((right * weights).sum() / weights.square().sum())


def test_length_is_regressed_out_on_training_concepts_alone() -> None:
    lengths, held_out = noise(N, 2, 5), noise(N, 2, 6)
    slopes = noise(2, 8, 7)
    rest, test_rest = noise(N, 8, 8), noise(N, 8, 9)
    train, test = measures.without(lengths, rest + lengths @ slopes, held_out, test_rest + held_out @ slopes)
    centred = lengths.double() - lengths.double().mean(0)
    assert (centred.T @ (train - train.mean(0))).abs().max() < 1e-8
    correlation = torch.corrcoef(torch.cat([held_out.double(), test], dim=1).T)[:2, 2:]
    assert correlation.abs().max() < 0.35
    untouched = measures.without(torch.ones(N, 2), rest, torch.ones(N, 2), test_rest)
    assert untouched[0] is rest


def test_wide_features_keep_their_likeness_as_principal_components() -> None:
    train, test = noise(40, 500, 1), noise(10, 500, 2)
    reduced, held_out = measures.principal(train, test, 64)
    assert reduced.shape == (40, 40)
    torch.testing.assert_close(
        measures.cosines(reduced, reduced),
        measures.cosines(train - train.mean(0), train - train.mean(0)),
        atol=1e-5,
        rtol=0,
    )
    assert held_out.shape == (10, 40)
