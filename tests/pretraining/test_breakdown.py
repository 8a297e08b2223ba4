import pytest
import torch

from d2v_scale.batch import Batch
from d2v_scale.data2vec import loss
from d2v_scale.data2vec.config import LossConfig
from d2v_scale.pretraining.breakdown import LossBreakdown


class OneProcess:
    def sum_over_model(self, x: torch.Tensor) -> None:
        del x


def test_the_loss_by_source_and_by_masked_share_adds_up() -> None:
    config, generator = LossConfig(), torch.Generator().manual_seed(0)
    breakdown = LossBreakdown(["a", "b"], torch.device("cpu"))
    total: dict[str, float] = {}
    for source, hidden in (("a", (1, 7)), ("b", (8, 3))):
        masked_rt = torch.zeros(2, 8, dtype=torch.bool)
        for row, count in enumerate(hidden):
            masked_rt[row, :count] = True
        batch = Batch(
            modality="text",
            inputs=torch.zeros(2, 8, dtype=torch.long),
            valid=None,
            masked_rt=masked_rt,
            sample_ids=torch.arange(2),
            source=source,
        )
        predictions_nd, targets_nd = torch.randn(2, sum(hidden), 4, generator=generator)
        breakdown.add(batch, [loss.Compared("one", 1.0, predictions_nd, targets_nd)], [targets_nd], config)
        total[source] = float(loss.masked_loss_sum(predictions_nd, targets_nd, config, 4))
        first = loss.masked_loss_sum(predictions_nd[: hidden[0]], targets_nd[: hidden[0]], config, 4)
        total[f"{source}0"], total[f"{source}1"] = float(first), total[source] - float(first)
    values = {name: float(value) for name, value in breakdown.figures(OneProcess()).items()}  # type: ignore[arg-type]
    assert values == pytest.approx(
        {
            "loss/a": total["a"] / 8,
            "loss/b": total["b"] / 11,
            "loss/masked_0_25": total["a0"] / 1,
            "loss/masked_25_50": total["b1"] / 3,
            "loss/masked_75_100": (total["a1"] + total["b0"]) / 15,
            "masked_share/a": 8 / 16,
            "masked_share/b": 11 / 16,
        },
        rel=1e-5,
    )


def test_the_spread_of_each_source_is_that_of_its_own_states() -> None:
    generator = torch.Generator().manual_seed(0)
    breakdown = LossBreakdown(["a", "b", "c"], torch.device("cpu"), widths=dict.fromkeys("abc", (4, 4)))
    scales = {"a": 1.0, "b": 0.01}
    for _ in range(2):
        for source, scale in scales.items():
            batch = Batch(
                modality="text",
                inputs=torch.zeros(2, 300, dtype=torch.long),
                valid=None,
                masked_rt=torch.ones(2, 300, dtype=torch.bool),
                sample_ids=torch.arange(2),
                source=source,
            )
            targets_nd = torch.randn(600, 4, generator=generator) * scale
            breakdown.add(batch, [loss.Compared("one", 1.0, 2 * targets_nd, targets_nd)], [targets_nd], LossConfig())
    values = breakdown.figures(OneProcess())  # type: ignore[arg-type]
    assert not any(name.endswith("/c") for name in values)
    for source, scale in scales.items():
        assert float(values[f"target_std/{source}"]) == pytest.approx(scale, rel=0.05)
        assert float(values[f"prediction_std/{source}"]) == pytest.approx(2 * scale, rel=0.05)
