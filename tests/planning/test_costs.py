"""What the parts of a step cost: the arithmetic of the terms, on figures that are easy to add up."""

import dataclasses

import pytest
from plan_jobs import FREE, NOTHING, planned

from d2v_scale.planning import hardware
from d2v_scale.planning.costs import Costs, Host, Rate, Ring, assumed
from d2v_scale.planning.job import Job
from d2v_scale.planning.step_time import StepTime, step_time

pytestmark = pytest.mark.usefixtures("world_of_one")


def time_of(job: Job, costs: Costs, per_node: int = 8) -> StepTime:
    return step_time(job, "vision", hardware.H100, per_node, costs)


def test_a_rate_lies_between_those_of_the_widths_around_it() -> None:
    rate = Rate(widths=(64, 256), flops=(1e9, 4e9))
    assert rate.at(128) == pytest.approx(2e9)
    assert (rate.at(16), rate.at(2048)) == (pytest.approx(1e9), pytest.approx(4e9))


def test_a_ring_has_its_steps_on_links_and_between_nodes() -> None:
    ring = Ring(start=100.0, link_step=1.0, network_step=10.0)
    assert ring.seconds(1, 8, 8) == 107
    assert ring.seconds(2, 8, 8) == 114
    assert ring.seconds(1, 1024, 8) == 100 + 896 + 1270
    assert ring.seconds(1, 4, 1) == 130


def test_what_takes_no_time_adds_none() -> None:
    assert time_of(planned("d2v2_vision_huge14", 3, 8), FREE).total == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_host_of_an_engine_is_a_floor(stage: int) -> None:
    """A plan for 1,024 ranks had steps that no host could issue."""
    host = Host(step=5.0, micro=7.0, layer=1.0, update_rate=1e30)
    costs = dataclasses.replace(FREE, **{f"zero_{stage}": host})
    time = time_of(planned("d2v2_vision_huge14", stage, 8, accumulation=4), costs)
    assert time.issuing == time.compute == pytest.approx(4 * (7 + 32))
    assert time.total == pytest.approx(4 * 39 + 5)
    other = time_of(planned("d2v2_vision_huge14", 4 - stage, 8, accumulation=4), costs)
    assert other.total == pytest.approx(0, abs=1e-9)


def test_a_device_computes_while_its_host_issues_and_a_cpu_does_not() -> None:
    job = planned("d2v2_vision_huge14", 1, 8)
    cost = job.costs["vision"]
    blocks = sum(one.total for one in cost.layers if one.layer.kind == "block")
    rates = {"blocks": Rate(widths=(1,), flops=(32 * blocks,)), "others": Rate(widths=(1,), flops=(32e30,))}
    costs = dataclasses.replace(FREE, zero_1=dataclasses.replace(NOTHING, layer=0.01), **rates)
    assert time_of(job, costs).total == pytest.approx(1.0, rel=1e-3)
    waiting = dataclasses.replace(costs, waits=True, crowded=1.5)
    assert time_of(job, waiting).total == pytest.approx(1.5 + 0.32, rel=1e-3)
    assert time_of(job, waiting, per_node=1).total == pytest.approx(1.0 + 0.32, rel=1e-3)


def test_collectives_grow_with_the_ranks() -> None:
    """The bytes that a rank sends do not; a gather of few bytes over 1,024 ranks was as fast as over 8."""
    costs = dataclasses.replace(FREE, ring=Ring(start=0.0, link_step=1.0, network_step=0.0))
    few, many = (time_of(planned("d2v2_vision_huge14", 1, ranks), costs, per_node=1024) for ranks in (8, 64))
    assert many.total == pytest.approx(63 / 7 * few.total)
    assert few.exposed > 0 < few.hidden


def test_a_pipeline_pays_hops_and_tensor_parallel_ranks_their_sums() -> None:
    """A stage's micro-batch comes and its gradient goes; two sums a block and pass, an all-reduce two steps."""
    costs = dataclasses.replace(FREE, hop=1.0)
    staged = time_of(planned("d2v2_vision_huge14", 1, 4, pipeline=2, accumulation=8), costs)
    assert staged.total == pytest.approx(2 * (8 + 1))
    assert staged.bubble == pytest.approx(1 / 9)
    costs = dataclasses.replace(FREE, ring=Ring(start=1.0, link_step=0.0, network_step=0.0))
    divided, alone = (
        time_of(planned("d2v2_vision_huge14", 1, 4, tensor=tensor, accumulation=2), costs) for tensor in (2, 1)
    )
    assert divided.exposed - alone.exposed == pytest.approx(2 * 32 * 3 * 2)


def test_assumed_costs_have_floors_that_decide_at_many_ranks() -> None:
    costs = assumed(hardware.H100, 0.4)
    time = time_of(planned("d2v2_vision_large", 3, 128), costs)
    assert time.issuing > time.products
    assert costs.zero_3.layer > costs.zero_1.layer > 0
