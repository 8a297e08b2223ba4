"""What an estimated step is made of."""

import dataclasses

import pytest
from plan_jobs import planned

from d2v_scale.planning import hardware, traffic
from d2v_scale.planning.costs import assumed
from d2v_scale.planning.job import Job
from d2v_scale.planning.step_time import StepTime, step_time

pytestmark = pytest.mark.usefixtures("world_of_one")


def time_of(
    job: Job, device: hardware.Hardware = hardware.H100, utilisation: float = 0.4, step: str = "vision"
) -> StepTime:
    return step_time(job, step, device, 8, assumed(device, utilisation))


def test_time_follows_the_peak_while_products_dominate() -> None:
    job = planned("d2v2_vision_huge14", 3, 8, accumulation=1)
    half, full = (time_of(job, utilisation=utilisation) for utilisation in (0.2, 0.4))
    assert half.products == half.compute == pytest.approx(2 * full.compute)
    cost = job.costs["vision"]
    assert full.compute == pytest.approx(256 * cost.total / (8 * hardware.H100.bf16_flops * 0.4))
    assert full.total >= full.compute + full.exposed


def test_a_slow_network_is_felt() -> None:
    job = planned("d2v2_vision_huge14", 1, 16)
    slow = dataclasses.replace(hardware.H100, network_bandwidth=1e8)
    assert time_of(job, slow).total > 2 * time_of(job).total


def test_every_tensor_parallel_rank_runs_stem_and_decoder_whole() -> None:
    """They were taken to be divided as the blocks are."""
    alone, divided = (planned("d2v2_speech_large", 1, 4, tensor=tensor) for tensor in (1, 4))
    whole, shared = (time_of(job, step="speech").products for job in (alone, divided))
    cost = alone.costs["speech"]
    blocks = sum(one.total for one in cost.layers if one.layer.kind == "block")
    assert blocks < 0.95 * cost.total
    assert shared / whole == pytest.approx((blocks / 4 + cost.total - blocks) / cost.total)


def test_nothing_overlaps_in_a_pipeline() -> None:
    """Its gradients are reduced after all passes and its teacher is gathered before them. Tensor-parallel ranks, which
    hold as much, do both on the way."""
    slow = dataclasses.replace(hardware.H100, link_bandwidth=hardware.H100.link_bandwidth / 10)
    added = {}
    for name, sizes in {"tensor": {"tensor": 2}, "pipeline": {"pipeline": 2}}.items():
        job = planned("d2v2_vision_huge14", 1, 4, accumulation=8, **sizes)
        fast_step, slow_step = (time_of(job, device) for device in (hardware.H100, slow))
        replicas = sum(
            one.within
            for one in traffic.transfers(job, "vision", 8)
            if one.name in ("gradient all-reduce", "teacher gather")
        )
        seconds = 9 * replicas / (hardware.H100.link_bandwidth * hardware.BANDWIDTH_REACHED)
        assert seconds > 0.01
        added[name] = (slow_step.hidden - fast_step.hidden, slow_step.exposed - fast_step.exposed, seconds)
    hidden, _, seconds = added["tensor"]
    assert hidden == pytest.approx(seconds)
    hidden, exposed, seconds = added["pipeline"]
    assert hidden == 0
    assert exposed > seconds


def test_a_pipeline_waits_for_a_teacher_in_host_memory() -> None:
    divided, staged = (
        planned("d2v2_vision_huge14", 1, 4, placement="cpu", accumulation=8, **sizes)
        for sizes in ({"tensor": 2}, {"pipeline": 2})
    )
    beside, alone = (time_of(job) for job in (divided, staged))
    assert alone.hidden == 0 < beside.hidden
    assert alone.update > beside.update
