"""d2v_scale.parallel.rank_loops (its values: tests/distributed/test_rank_loops.py)"""

import logging

import deepspeed
import pytest

from d2v_scale.parallel import rank_loops


def test_what_is_replaced_is_what_was_read() -> None:
    if deepspeed.__version__ != rank_loops.WRITTEN_FOR:
        pytest.skip(f"written for DeepSpeed {rank_loops.WRITTEN_FOR}, found {deepspeed.__version__}")
    # Where an engine of another test has replaced it already, it was what was read.
    assert rank_loops._replaced or rank_loops.digests() == rank_loops._EXPECTED


@pytest.mark.parametrize("gone", [False, True])
def test_another_deepspeed_keeps_its_own_code_and_says_so_once(
    gone: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from deepspeed.runtime.comm import coalesced_collectives
    from deepspeed.runtime.zero import partition_parameters, stage3

    monkeypatch.setattr(rank_loops, "_replaced", None)
    if gone:
        monkeypatch.delattr(coalesced_collectives, "reduce_scatter_coalesced")
    else:
        monkeypatch.setitem(rank_loops._EXPECTED, "reduce_scatter_coalesced", "another")
    before = partition_parameters.Init._convert_to_deepspeed_param, stage3.reduce_scatter_coalesced
    with caplog.at_level(logging.WARNING):
        assert not rank_loops.replace()
        assert not rank_loops.replace()
    assert before == (partition_parameters.Init._convert_to_deepspeed_param, stage3.reduce_scatter_coalesced)
    (record,) = caplog.records
    assert "reduce_scatter_coalesced" in record.getMessage()
    assert deepspeed.__version__ in record.getMessage()
    assert "AllGatherCoalescedHandle" not in record.getMessage()
