"""d2v_scale.parallel.groups"""

import pytest
import torch

from d2v_scale.parallel import groups


def test_a_process_on_its_own_takes_the_gpu_of_its_local_rank(
    world_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes of `torchrun tools/extract.py` ran on the first GPU."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(groups, "_select_device", lambda local_rank: torch.device("cuda", local_rank))
    topology = groups.single_process()
    assert (topology.device, topology.local_rank) == (torch.device("cuda", 3), 3)
