"""Communication on paper against collectives that were counted."""

from typing import Any

import plan_worker
import pytest
from plan_jobs import IDS, job_of, planned, stages_of

from d2v_scale.planning import traffic

pytestmark = pytest.mark.usefixtures("world_of_one")


KINDS = {
    "gather": {"teacher gather", "weight gather"},
    "reduce_scatter": {"gradient scatter"},
    "allreduce": {"gradient all-reduce", "tensor-parallel sums", "Muon's matrices"},
    "send": {"between stages"},
}
"""Part of a collective's name -> what is planned to use it."""


def sent(job: Any, devices_per_node: int = 8) -> dict[str, float]:
    return {one.name: one.sent for one in traffic.transfers(job, "vision", devices_per_node)}


@pytest.mark.parametrize("key", IDS, ids=str)
def test_collectives_send_what_was_planned(key: tuple[int, str], measured: dict[Any, dict[str, Any]]) -> None:
    job = job_of(measured[key])
    [sequence] = job.recipe.sequences
    for stage, ranks in enumerate(stages_of(measured[key])):
        found = dict.fromkeys(KINDS, 0.0)
        for one in traffic.stage_transfers(job, sequence, 8, stage):
            found[next(kind for kind, names in KINDS.items() if one.name in names)] += one.sent
        for kind, size in found.items():
            most = max(sum(n for name, n in rank["sent"].items() if kind in name) for rank in ranks)
            # Norms, counts, verdicts and the shapes of what is sent: a few numbers.
            assert size == pytest.approx(most, rel=0.05, abs=1000), (stage, kind)


def test_a_step_at_zero3_sends_three_times_the_student_and_once_the_teacher(
    measured: dict[Any, dict[str, Any]],
) -> None:
    """Student: gathered for forward and backward, gradients scattered. Teacher: gathered once, whatever M."""
    shared, others = {}, 3 / 4
    for name, clones in (("z3_released", plan_worker.CLONES), ("z3_released_one_mask", 1)):
        case = measured[4, name]
        job = job_of(case)
        assert job.recipe.objective.masking.clones == clones
        student, teacher = (2 * sum(one.numel for one in tensors) for tensors in job.stage_tensors[0])
        for rank in case["ranks"]:
            sent = {kind: size for kind, size in rank["sent"].items() if "gather" in kind or "scatter" in kind}
            of_teacher = sum(size for kind, size in sent.items() if kind.startswith("teacher "))
            assert of_teacher == pytest.approx(teacher * others, rel=1e-6)
            # Small parameters stay gathered between forward and backward.
            assert sum(sent.values()) - of_teacher == pytest.approx(3 * student * others, rel=0.01)
        shared[name] = case["ranks"]
    one, several = shared.values()
    assert [rank["sent"] for rank in one] == [rank["sent"] for rank in several]


def test_what_crosses_nodes_is_shared_by_a_node() -> None:
    ring = traffic.Transfer("x", moved=1600.0, passes=1, group=16, on_node=8, hidden=True)
    assert ring.sent == pytest.approx(1500)
    assert ring.within == pytest.approx(1400)
    # Each of two nodes must get the other's half, over eight adapters.
    assert ring.between == pytest.approx(100)
    alone = traffic.Transfer("x", moved=1600.0, passes=2, group=4, on_node=4, hidden=True)
    assert (alone.within, alone.between) == (2400, 0)


def test_a_pipeline_hands_on_states_taps_and_gradients() -> None:
    job = planned("d2v2_vision_huge14", 1, 4, pipeline=2, accumulation=8)
    lengths, width = job.lengths["vision"], job.recipe.model.backbone.width
    samples = job.recipe.global_batch_size / 4
    student = 2 * samples * lengths.clones * (lengths.kept + 1) * width
    teacher = 2 * samples * (lengths.positions + 1) * width
    taps = 4 * samples * lengths.positions * width
    assert sent(job)["between stages"] == pytest.approx(student + max(teacher + taps, 0))


def test_stages_on_other_nodes_use_the_network() -> None:
    near = traffic.transfers(planned("d2v2_vision_huge14", 1, 4, pipeline=2, accumulation=8), "vision", 8)
    far = traffic.transfers(planned("d2v2_vision_huge14", 1, 4, pipeline=2, accumulation=8), "vision", 4)
    (hop,), (long_hop,) = ([one for one in found if one.name == "between stages"] for found in (near, far))
    assert hop.between == 0 < hop.within
    assert long_hop.within == 0 < long_hop.between
