"""Where a spike is decided inside DeepSpeed's step."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from d2v_scale.errors import ConfigError
from d2v_scale.parallel.spike_watch import SpikeWatch
from d2v_scale.spikes import SpikeConfig

ALONE: Any = SimpleNamespace(world_size=1, tensor_size=1)


@pytest.mark.parametrize(("stage", "asked"), [(1, "scaled_global_norm"), (3, "_get_norm_groups")])
def test_a_deepspeed_that_computes_its_norm_otherwise_is_refused_by_name(stage: int, asked: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.spikes\.on_spike.*has no {asked}.*deepspeed==0\.19\.8"):
        SpikeWatch(SpikeConfig(on_spike="skip"), object(), stage, ALONE)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_whose_loss_is_a_spike_has_no_finite_norm(stage: int) -> None:
    zero = SimpleNamespace(loss_scale=1.0, scaled_global_norm=lambda: 5.0, _get_norm_groups=lambda: [torch.tensor(5.0)])
    watch = SpikeWatch(SpikeConfig(on_spike="skip", after=2, window=4), zero, stage, ALONE)

    def norm(loss: float) -> float:
        watch.loss = torch.tensor(loss, dtype=torch.float64)
        return float(zero.scaled_global_norm() if stage < 3 else zero._get_norm_groups()[0])

    assert [norm(loss) for loss in (1.0, 1.1, 1.0)] == [5.0] * 3
    assert watch.take() is None
    assert math.isnan(norm(9.0))
    spike = watch.take()
    assert spike is not None
    assert (spike.of, spike.loss, spike.norm) == ("loss", 9.0, 5.0)
    assert norm(1.0) == 5.0


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_is_not_finite_is_judged_by_nothing(stage: int) -> None:
    zero = SimpleNamespace(loss_scale=1.0, scaled_global_norm=lambda: -1.0)
    zero._get_norm_groups = lambda: [torch.tensor(-1.0)]
    watch = SpikeWatch(SpikeConfig(on_spike="skip", after=2, window=4), zero, stage, ALONE)
    watch.loss = torch.tensor(float("nan"), dtype=torch.float64)
    assert float(zero.scaled_global_norm() if stage < 3 else zero._get_norm_groups()[0]) == -1
    assert watch.take() is None
