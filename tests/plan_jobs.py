"""Jobs to plan: those that were measured, and published recipes on clusters of any size."""

from typing import Any

import plan_worker

from d2v_scale import command_line
from d2v_scale.parallel.config import ParallelConfig
from d2v_scale.planning.costs import Costs, Host, Rate, Ring
from d2v_scale.planning.job import Job, ModelSizes

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
RELEASED = {"stage": 3, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}

CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        {"name": "z1", "zero": {"stage": 1}, "precision": "bf16"},
        {"name": "z3_fp32", "zero": {"stage": 3}, "precision": "fp32"},
    ],
    2: [
        {"name": "z1", "zero": {"stage": 1}, "precision": "bf16"},
        {"name": "z2_accumulation", "zero": {"stage": 2}, "precision": "bf16", "accumulation": 2},
        {"name": "z2_offload", "zero": {"stage": 2, **OFFLOAD}, "precision": "bf16", "placement": "cpu"},
        {"name": "z2_pairs", "zero": {"stage": 2}, "precision": "bf16", "pairs": True},
        {"name": "z3_accumulation", "zero": {"stage": 3}, "precision": "bf16", "accumulation": 2},
        {
            "name": "z3_offload",
            "zero": {"stage": 3, **OFFLOAD, "offload_param": {"device": "cpu"}},
            "precision": "fp32",
            "placement": "cpu",
        },
        {"name": "z1_muon", "zero": {"stage": 1}, "precision": "bf16", "muon": True},
        {"name": "z3_muon", "zero": {"stage": 3}, "precision": "fp32", "muon": True},
        {"name": "t2_z1", "zero": {"stage": 1}, "precision": "bf16", "tensor": 2},
        {"name": "t2_recomputed", "zero": {"stage": 1}, "precision": "bf16", "tensor": 2, "checkpointing": True},
        {"name": "p2", "zero": {"stage": 1}, "precision": "bf16", "pipeline": 2, "accumulation": 4},
    ],
    4: [
        {"name": "z1_fp32", "zero": {"stage": 1}, "precision": "fp32", "placement": "cpu"},
        {"name": "z3_released", "zero": RELEASED, "precision": "bf16"},
        {"name": "z3_released_one_mask", "zero": RELEASED, "precision": "bf16", "clones": 1},
        {"name": "t2_z3", "zero": {"stage": 3}, "precision": "bf16", "tensor": 2},
        {"name": "t2_z3_muon", "zero": {"stage": 3}, "precision": "bf16", "tensor": 2, "muon": True},
        {"name": "t2_z2", "zero": {"stage": 2}, "precision": "bf16", "tensor": 2},
        {"name": "p2_d2", "zero": {"stage": 1}, "precision": "bf16", "pipeline": 2, "accumulation": 2},
        {"name": "p2_d2_fp32", "zero": {"stage": 1}, "precision": "fp32", "pipeline": 2, "accumulation": 2},
        {"name": "t2_p2", "zero": {"stage": 1}, "precision": "bf16", "tensor": 2, "pipeline": 2, "accumulation": 2},
    ],
}
NOTHING = Host(step=0.0, micro=0.0, layer=0.0, update_rate=1e30)
FREE = Costs(
    source="a test",
    precision="bf16",
    blocks=Rate(widths=(1,), flops=(1e30,)),
    others=Rate(widths=(1,), flops=(1e30,)),
    crowded=1.0,
    zero_1=NOTHING,
    zero_3=NOTHING,
    ring=Ring(start=0.0, link_step=0.0, network_step=0.0),
    link=1e30,
    network=1e30,
    hop=0.0,
    waits=False,
)
"""Costs of which nothing takes time."""

IDS = [(world_size, case["name"]) for world_size, cases in CASES.items() for case in cases]


def stages_of(measured: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """The ranks of each pipeline stage: megatron counts tensor, then data, then pipeline."""
    ranks, count = measured["ranks"], measured["case"].get("pipeline", 1)
    each = len(ranks) // count
    return [ranks[stage * each : (stage + 1) * each] for stage in range(count)]


def job_of(measured: dict[str, Any]) -> Job:
    """The job that ranks of `plan_worker` ran."""
    case, world_size = measured["case"], measured["world_size"]
    recipe = plan_worker.recipe_of(case, world_size)
    return Job.of(recipe, plan_worker.zero_of(case), world_size, ModelSizes.of(recipe))


def planned(
    name: str,
    stage: int,
    data: int,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    accumulation: int = 1,
    offload: bool = False,
    placement: str = "device",
) -> Job:
    """A recipe of the package on some ranks."""
    recipe = command_line.parse([f"--recipe={name}"])[0]
    recipe.parallel = ParallelConfig(tensor=tensor, pipeline=pipeline)
    recipe.accumulation = accumulation
    recipe.teacher.placement = placement  # type: ignore[assignment]
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 50_000_000}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return Job.of(recipe, {"zero_optimization": zero}, data * tensor * pipeline, ModelSizes.of(recipe))
