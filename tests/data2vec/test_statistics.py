import pytest
import torch

from d2v_scale.data2vec.statistics import effective_rank, linear_cka, mean_cosine, moments, std_from_moments


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
