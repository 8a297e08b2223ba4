import pytest
import torch

from d2v_scale.breakdown import LossBreakdown
from d2v_scale.data.batch import Batch
from d2v_scale.data2vec import loss
from d2v_scale.data2vec.config import LossConfig


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
        breakdown.add(batch, predictions_nd, targets_nd, config)
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
        },
        rel=1e-5,
    )
