"""Bytes on paper against bytes of real tensors, and what must follow from them at any size."""

from typing import Any

import pytest
from plan_jobs import IDS, job_of, planned, stages_of

from d2v_scale.planning import memory

pytestmark = pytest.mark.usefixtures("world_of_one")


@pytest.mark.parametrize("key", IDS, ids=str)
def test_held_bytes_are_those_planned(key: tuple[int, str], measured: dict[Any, dict[str, Any]]) -> None:
    job = job_of(measured[key])
    for stage, ranks in enumerate(stages_of(measured[key])):
        device, host = memory.held(job, stage)
        for name in device:
            most = max(rank["held"][name] for rank in ranks)
            assert device[name] + host.get(name, 0) == pytest.approx(most, rel=0.05), (stage, name)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_more_ranks_never_hold_more(zero: int) -> None:
    held = [memory.budget(planned("d2v2_vision_huge14", zero, data)).device_total for data in (1, 8, 64)]
    # One rank gathers nothing, so its buffers are smaller.
    assert held[0] * 1.1 > held[1] > held[2]


def test_offload_moves_bytes_and_loses_none() -> None:
    here, there = (
        planned("d2v2_vision_huge14", 3, 8),
        planned("d2v2_vision_huge14", 3, 8, offload=True, placement="cpu"),
    )
    (device, _), (left, host) = memory.held(here, 0), memory.held(there, 0)
    for name in ("gradients", "master and moments", "teacher fp32"):
        assert left[name] == 0
        assert host[name] == pytest.approx(device[name])
    assert left["teacher compute"] == device["teacher compute"] > 0


def test_stages_of_a_pipeline_share_the_model() -> None:
    whole = memory.held(planned("d2v2_vision_huge14", 1, 8), 0)[0]
    job = planned("d2v2_vision_huge14", 1, 8, pipeline=4)
    stages = [memory.held(job, stage)[0] for stage in range(4)]
    for name in ("weights", "master and moments", "teacher fp32"):
        assert sum(stage[name] for stage in stages) == pytest.approx(whole[name], rel=0.01)
    assert memory.budget(job).device_total == max(memory.stage_budget(job, stage).device_total for stage in range(4))


def test_the_first_stage_keeps_most_micro_batches() -> None:
    job = planned("d2v2_vision_huge14", 1, 8, pipeline=4, accumulation=8)
    kept = [memory.stage_activations(job, stage, "vision") for stage in range(4)]
    assert kept[0] > kept[1] > kept[2]


def test_checkpointing_keeps_less() -> None:
    job = planned("d2v2_vision_huge14", 3, 8)
    before = memory.budget(job).device["activations"]
    job.recipe.model.activation_checkpointing = True
    assert memory.budget(job).device["activations"] < before / 4


def test_the_copy_that_a_checkpoint_is_written_from_is_in_host_memory() -> None:
    """16 bytes a parameter over all ranks, which was missing; pinned memory comes in powers of two."""
    job = planned("d2v2_vision_huge14", 3, 8)
    device, _ = memory.held(job, 0)
    found = memory.budget(job).host["checkpoint"]
    exact = device["master and moments"] + device["teacher fp32"]
    assert exact <= found < 2 * exact
    assert found.is_integer()
    assert int(found).bit_count() == 1
    assert memory.budget(job).host_total >= found


def test_copies_in_memory_are_two_generations_of_two_shards_and_a_snapshot() -> None:
    job = planned("d2v2_vision_huge14", 3, 8)
    assert memory.budget(job).host["memory copies"] == 0
    job.recipe.checkpoint.memory.every = 50
    device, _ = memory.held(job, 0)
    shard = device["master and moments"] + device["teacher fp32"]
    assert memory.budget(job).host["memory copies"] == memory.budget(job).host["checkpoint"] + 4 * shard
