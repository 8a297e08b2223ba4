import math

import pytest
import torch

from d2v_scale.data2vec.statistics import (
    effective_rank,
    lidar,
    linear_cka,
    mean_cosine,
    moments,
    rankme,
    std_from_moments,
)


def sample(n: int = 40, d: int = 8) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * 2 + 100


def test_std_is_the_mean_over_channels_of_the_unbiased_standard_deviation() -> None:
    x = sample()
    assert float(std_from_moments(*moments(x))) == pytest.approx(float((x.var(0) + 1e-6).sqrt().mean()), rel=1e-5)


def test_acceptance_6_std_from_two_unequal_ranks_equals_that_of_the_union() -> None:
    x = sample()
    parts = [moments(x[:7]), moments(x[7:])]
    together = [a + b for a, b in zip(*parts, strict=True)]
    torch.testing.assert_close(std_from_moments(*together), std_from_moments(*moments(x)))


@pytest.mark.parametrize("n", [0, 1])
def test_std_of_too_few_rows_is_finite(n: int) -> None:
    assert torch.isfinite(std_from_moments(*moments(sample(n))))


def test_effective_rank_counts_directions() -> None:
    line = torch.outer(torch.arange(20.0), torch.ones(6))
    assert float(effective_rank(line)) == pytest.approx(1.0, rel=1e-4)
    axes = torch.cat((torch.eye(6), -torch.eye(6))).repeat(3, 1)
    assert float(effective_rank(axes)) == pytest.approx(6.0, rel=1e-4)
    assert float(effective_rank(axes[:, :6].T.repeat(1, 2))) > 1.0
    assert torch.isfinite(effective_rank(torch.zeros(4, 6)))


def test_mean_cosine_equals_the_mean_over_pairs() -> None:
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(x, dim=-1)
    pairs = [float(unit[i] @ unit[j]) for i in range(9) for j in range(9) if i != j]
    assert float(mean_cosine(x)) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert float(mean_cosine(torch.ones(3, 4))) == pytest.approx(1.0, abs=1e-6)


def test_cka_ignores_rotation_and_scale_and_tells_unrelated_apart() -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0)
    assert linear_cka(x, torch.randn(200, 8)) < 0.2


def test_cka_leaves_out_what_has_no_weight() -> None:
    x, y = torch.randn(50, 6), torch.randn(50, 4)
    weight = torch.cat((torch.ones(30), torch.zeros(20)))
    assert float(linear_cka(x, y, weight)) == pytest.approx(float(linear_cka(x[:30], y[:30])))


def random_of_rank(rank: int, rows: int = 40, width: int = 12) -> torch.Tensor:
    """Features in which `rank` directions have the singular value 1."""
    generator = torch.Generator().manual_seed(rank)
    left, _ = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64, generator=generator))
    return left @ right.T


@pytest.mark.parametrize("rank", [1, 2, 7, 12])
def test_rankme_of_r_directions_alike_is_r_at_any_scale(rank: int) -> None:
    x = random_of_rank(rank)
    for scale in (1e-6, 1.0, 1e6):
        assert float(rankme(scale * x)) == pytest.approx(rank, rel=1e-9)
    assert float(rankme(x.T)) == pytest.approx(rank, rel=1e-9)


def test_rankme_is_the_entropy_of_the_singular_values_not_of_their_squares() -> None:
    shares = (0.75, 0.25)
    x = torch.zeros(5, 4)
    x[0, 1], x[3, 2] = 3.0, -1.0
    assert float(rankme(x)) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


def test_rankme_of_identical_rows_is_one_and_of_nothing_nought() -> None:
    assert float(rankme(torch.full((9, 4), 3.7))) == pytest.approx(1.0)
    assert float(rankme(torch.zeros(9, 4))) == 0.0


def views_of(means: torch.Tensor, spread_d: torch.Tensor) -> torch.Tensor:
    """Two views a channel around each mean, so that what is within samples is diagonal: spread^2 / D."""
    offsets = torch.diag(spread_d.double())
    return means.double()[:, None] + torch.cat((offsets, -offsets))


def corners(rank: int, width: int = 6) -> torch.Tensor:
    """Means that vary alike along the first `rank` axes, which are not correlated."""
    return torch.cat((torch.eye(width)[:rank], -torch.eye(width)[:rank]))


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_lidar_counts_directions_that_tell_samples_apart_at_any_scale(rank: int) -> None:
    x = views_of(corners(rank), torch.full((6,), 0.3)) + 5.0
    for scale in (1e-6, 1.0, 1e6):
        assert float(lidar(scale * x)) == pytest.approx(rank, rel=1e-6)


def test_lidar_counts_a_direction_less_in_which_views_differ() -> None:
    spread = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 1.0])
    shares = (0.9, 0.1)
    wanted = math.exp(-sum(p * math.log(p) for p in shares))
    assert float(lidar(views_of(corners(2), spread), delta=0.0)) == pytest.approx(wanted)
    assert float(lidar(views_of(corners(2), spread))) == pytest.approx(wanted, rel=1e-3)


def test_lidar_of_samples_that_are_all_alike_is_nought_and_of_views_that_are_is_finite() -> None:
    assert float(lidar(views_of(torch.full((8, 6), 0.7), torch.ones(6)))) == 0.0
    assert float(lidar(torch.zeros(4, 3, 5))) == 0.0
    assert float(lidar(torch.full((4, 3, 5), 0.1))) == 0.0
    assert float(lidar(views_of(corners(3), torch.zeros(6)))) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_rank_and_stop_nothing(wrong: float) -> None:
    """The decompositions raise for them, which ended the run at its next evaluation."""
    x = torch.ones(6, 4)
    x[2, 1] = wrong
    assert math.isnan(float(rankme(x)))
    assert math.isnan(float(lidar(x.view(3, 2, 4))))


def test_lidar_does_not_depend_on_how_features_are_mixed() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 5, 6, dtype=torch.float64, generator=generator) * torch.tensor([3, 2, 1, 1, 1, 1])
    x += 2 * torch.randn(30, 1, 6, dtype=torch.float64, generator=generator)
    mixed = x @ torch.randn(6, 6, dtype=torch.float64, generator=generator) + 4
    assert float(lidar(mixed, delta=1e-12)) == pytest.approx(float(lidar(x, delta=1e-12)), rel=1e-6)
    assert 1 < float(rankme(mixed[:, 0])) < float(rankme(x[:, 0]))
