"""One rank of the cases that plans are compared with: bytes held, and bytes given to collectives in one step.

    plan_worker.py CASES.json OUT.json

A case: name, tensor, zero (the JSON's `zero_optimization`), precision, placement, accumulation, checkpointing.
Rank 0 writes for every case what each rank held and what each rank communicated.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from d2v_scale.data.batch import Batch
from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.data2vec.loss import masked_loss_sum
from d2v_scale.model.config import Backbone, ModelConfig, Predictor, VisionStem
from d2v_scale.model.init import initialize
from d2v_scale.model.stack import Draw, Student, Teacher
from d2v_scale.optim import OptimConfig, make_optimizer, parameter_groups
from d2v_scale.parallel import ds_config, groups
from d2v_scale.parallel.memory import held_bytes
from d2v_scale.parallel.zero import build_student
from d2v_scale.recipe import Recipe
from d2v_scale.step import masked_targets
from d2v_scale.teacher import ShardedTeacher, TeacherConfig

SAMPLES, CLONES, KEPT = 2, 3, 4
"""Of each micro-batch and data-parallel rank; patches kept of 16."""


def recipe_of(case: dict[str, Any], world_size: int) -> Recipe:
    """The recipe that a case trains: a small 2.0 vision model."""
    backbone = Backbone(width=128, heads=4, ffn=512, depth=4, prenet_depth=1)
    decoder = Predictor(kind="conv2d", width=64, kernel=3, groups=4, layers=2)
    model = ModelConfig(
        visible_only=True,
        vision=VisionStem(image_size=16, patch_size=4, positions="sincos"),
        backbone=backbone,
        predictor=decoder,
        activation_checkpointing=case.get("checkpointing", False),
    )
    parallel = groups.ParallelConfig(tensor=case.get("tensor", 1))
    accumulation = case.get("accumulation", 1)
    return Recipe(
        model=model,
        objective=ObjectiveConfig(
            masking=MaskingConfig(kind="random", prob=0.75, clones=CLONES), target=TargetConfig(top_k_layers=2)
        ),
        teacher=TeacherConfig(placement=case.get("placement", "device")),
        precision=case["precision"],
        parallel=parallel,
        accumulation=accumulation,
        global_batch_size=SAMPLES * accumulation * groups.data_parallel_size(parallel, world_size),
        optim=OptimConfig(decay_on="matrices"),
    )


def zero_of(case: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's JSON of a case."""
    small = {"stage3_param_persistence_threshold": 1000, "reduce_bucket_size": 200_000}
    return {"zero_optimization": {**small, **case["zero"]}}


class Traffic:
    """Bytes that a ring sends from this rank, by kind of collective and size of the group, while `counting`."""

    def __init__(self) -> None:
        self.counting = False
        self.sent: Counter[str] = Counter()
        # Names differ between versions of torch.
        for name, passes, whole in _COLLECTIVES:
            if hasattr(dist.ProcessGroup, name):
                self._listen(name, passes, whole)

    def _listen(self, name: str, passes: float, whole: int) -> None:
        original = getattr(dist.ProcessGroup, name)

        def counted(group: Any, *args: Any, **kwargs: Any) -> Any:
            if self.counting:
                count = group.size()
                self.sent[f"{name} {count}"] += passes * _bytes(args[whole]) * (count - 1) / count
            return original(group, *args, **kwargs)

        setattr(dist.ProcessGroup, name, counted)


# Name; how often a ring passes the whole; which argument is the whole, output or input.
_COLLECTIVES = [
    ("allreduce", 2.0, 0),
    ("broadcast", 1.0, 0),
    ("reduce", 1.0, 0),
    *((name, 1.0, 0) for name in ("allgather", "_allgather_base", "all_gather_single")),
    *((name, 1.0, 0) for name in ("allgather_into_tensor_coalesced", "all_gather_single_coalesced")),
    *((name, 1.0, 1) for name in ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single")),
    *((name, 1.0, 1) for name in ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced")),
    *((name, 1.0, 0) for name in ("alltoall", "alltoall_base", "all_to_all_single")),
]


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else sum(_bytes(each) for each in value)


def measure(case: dict[str, Any], traffic: Traffic) -> dict[str, Any]:
    """Three steps: DeepSpeed learns the order of modules in the first two, and the last one is measured."""
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    recipe = recipe_of(case, world_size)
    topology = groups.initialize(recipe.parallel)
    numbers = ds_config.RecipeNumbers(
        precision=case["precision"], accumulation=recipe.accumulation, global_batch_size=recipe.global_batch_size
    )
    config = ds_config.resolve(zero_of(case), numbers, recipe.parallel, world_size)
    student = build_student(
        lambda: Student(recipe.model),
        config,
        lambda named: make_optimizer(parameter_groups(named, recipe.optim), recipe.optim),
        topology,
        lambda module: initialize(module, 0),
    )
    teacher = ShardedTeacher(
        lambda: Teacher(recipe.model, recipe.objective.target, recipe.parts()),
        student,
        recipe.teacher,
        config,
        topology,
        recipe.parts().role,
    )
    generator = torch.Generator().manual_seed(topology.data_parallel_rank)
    for step in range(3):
        traffic.counting = step == 2
        for _ in range(recipe.accumulation):
            order = torch.rand(SAMPLES * CLONES, 16, generator=generator).argsort(1)
            batch = Batch(
                modality="vision",
                inputs=torch.randn(SAMPLES, 3, 16, 16, generator=generator),
                valid=None,
                masked_rt=order >= KEPT,
                sample_ids=torch.arange(SAMPLES),
            )
            output = student(batch, Draw(seed=0, step=step))
            targets = masked_targets(teacher(batch, output.features_btd), batch)
            loss = masked_loss_sum(output.predictions_nd, targets, recipe.objective.loss, recipe.model.backbone.width)
            student.backward(loss)
        held = held_bytes(student, teacher)
        assert student.step().applied
        teacher.update(0.99)
    traffic.counting = False
    found = {"held": held, "sent": dict(traffic.sent)}
    traffic.sent.clear()
    everyone: list[Any] = [None] * topology.world_size
    dist.all_gather_object(everyone, found)
    teacher.destroy()
    student.destroy()
    return {"case": case, "world_size": world_size, "ranks": everyone}


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    traffic, done = Traffic(), []
    for tensor in sorted({case.get("tensor", 1) for case in cases}):
        for case in cases:
            if case.get("tensor", 1) == tensor:
                done.append(measure(case, traffic))
        if torch.distributed.get_rank() == 0:
            out.write_text(json.dumps(done))
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
