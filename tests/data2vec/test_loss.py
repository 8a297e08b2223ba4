import pytest
import torch

from d2v_scale.data2vec.config import LossConfig
from d2v_scale.data2vec.loss import cls_loss_sum, elementwise, masked_loss_sum


@pytest.mark.parametrize(
    ("config", "error", "expected"),
    [
        (LossConfig(), 1.0, 768**0.5),
        (LossConfig(beta=4.0, scale=1.0), 1.0, 96.0),
        (LossConfig(beta=2.0, reduction="mean_channels"), 1.0, 0.25),
        (LossConfig(beta=2.0, reduction="mean_channels"), 3.0, 2.0),
        (LossConfig(beta=2.0, reduction="mean_channels"), 5.0, 4.0),
        (LossConfig(beta=4.0, reduction="mean_channels"), 3.0, 1.125),
        (LossConfig(beta=4.0, reduction="mean_channels"), 5.0, 3.0),
    ],
)
def test_acceptance_4_published_loss_values_at_width_768(config: LossConfig, error: float, expected: float) -> None:
    positions = 5
    total = masked_loss_sum(torch.full((positions, 768), error), torch.zeros(positions, 768), config, 768)
    assert float(total) / positions == pytest.approx(expected, rel=1e-5)


def test_smooth_l1_and_its_slope_are_torchs() -> None:
    x = torch.linspace(-6, 6, 101, requires_grad=True)
    ours = elementwise(x, torch.zeros(101), 2.0).sum()
    (ours_grad,) = torch.autograd.grad(ours, x)
    theirs = torch.nn.functional.smooth_l1_loss(x, torch.zeros(101), beta=2.0, reduction="sum")
    (theirs_grad,) = torch.autograd.grad(theirs, x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_grad, theirs_grad)


def test_no_masked_position_gives_zero_with_a_gradient_path() -> None:
    predictions = torch.zeros(0, 8, requires_grad=True)
    total = masked_loss_sum(predictions, torch.zeros(0, 8), LossConfig(), 8)
    total.backward()
    assert float(total.detach()) == 0.0


def test_acceptance_11_unequal_masked_counts_divided_globally_equal_the_union() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(11, 8, generator=generator), torch.randn(11, 8, generator=generator)
    whole = masked_loss_sum(predictions, targets, LossConfig(), 8) / 11
    ranks = [slice(0, 3), slice(3, 11)]
    # Each rank scales its sum by ranks / global count; the engine averages over ranks.
    scaled = [masked_loss_sum(predictions[s], targets[s], LossConfig(), 8) * (2 / 11) for s in ranks]
    torch.testing.assert_close(sum(scaled) / 2, whole)


def test_acceptance_10_the_cls_term_per_row_does_not_depend_on_the_batch_size() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 4, 8, generator=generator)
    predictions = torch.randn(6, 8, generator=generator)
    config = LossConfig(cls_weight=0.5)
    once = cls_loss_sum(predictions, targets, config, 8) / 6
    doubled = cls_loss_sum(predictions.repeat(2, 1), targets.repeat(2, 1, 1), config, 8) / 12
    torch.testing.assert_close(once, doubled)
    expected = 0.5 * 8**-0.5 * (predictions - targets.mean(1).repeat_interleave(3, 0)).square().sum(-1).mean()
    torch.testing.assert_close(once, expected)
