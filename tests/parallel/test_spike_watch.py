"""Where a spike is decided inside DeepSpeed's step."""

import pytest

from d2v_scale.errors import ConfigError
from d2v_scale.parallel.spike_watch import SpikeWatch
from d2v_scale.spikes import SpikeConfig


@pytest.mark.parametrize(("stage", "asked"), [(1, "scaled_global_norm"), (3, "_get_norm_groups")])
def test_a_deepspeed_that_computes_its_norm_otherwise_is_refused_by_name(stage: int, asked: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim\.spikes\.on_spike.*has no {asked}.*deepspeed==0\.19\.8"):
        SpikeWatch(SpikeConfig(on_spike="skip"), object(), stage)
