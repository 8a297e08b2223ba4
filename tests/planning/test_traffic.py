"""Communication on paper against collectives that were counted."""

from typing import Any

import pytest
from plan_jobs import IDS, job_of, planned

from d2v_scale.planning import traffic

pytestmark = pytest.mark.usefixtures("world_of_one")


def sent(job: Any, devices_per_node: int = 8) -> dict[str, float]:
    return {one.name: one.sent for one in traffic.transfers(job, "vision", devices_per_node)}


@pytest.mark.parametrize("key", IDS, ids=str)
def test_collectives_send_what_was_planned(key: tuple[int, str], measured: dict[Any, dict[str, Any]]) -> None:
    job, ranks = job_of(measured[key]), measured[key]["ranks"]
    by_kind = {"gather": 0.0, "scatter": 0.0, "reduce": 0.0}
    for name, size in sent(job).items():
        kind = "gather" if "gather" in name else "scatter" if "scatter" in name else "reduce"
        by_kind[kind] += size
    for kind, planned_bytes in by_kind.items():
        most = max(sum(n for name, n in rank["sent"].items() if kind in name.split()[0]) for rank in ranks)
        if kind == "reduce":
            most = max(sum(n for name, n in rank["sent"].items() if name.startswith("allreduce")) for rank in ranks)
        # Norms, counts and verdicts: a few numbers.
        assert planned_bytes == pytest.approx(most, rel=0.05, abs=100), kind


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
