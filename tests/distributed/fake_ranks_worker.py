"""Rank 0 of a large world, alone in its process, over torch's fake process group: counts of what a step does.

    fake_ranks_worker.py CASE.json OUT.json

The case: world_size, depth, zero (the JSON's `zero_optimization`), and where they matter width, accumulation,
precision, checkpointing, placement. Nothing is sent, so values are not those of a run; counts of Python calls, of
process groups and of collectives are.
"""

import cProfile
import json
import os
import pstats
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from d2v_scale.batch import Batch
from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.stem_config import VisionStem
from d2v_scale.networks.draw import Draw
from d2v_scale.optim import OptimConfig
from d2v_scale.parallel import groups, layout_check
from d2v_scale.planning import collectives, legal, memory, traffic
from d2v_scale.planning.job import Job, ModelSizes
from d2v_scale.pretraining.step import collapse_statistics, train_step
from d2v_scale.recipe import Recipe
from d2v_scale.teacher.config import TeacherConfig
from d2v_scale.teacher.sharded import ShardedTeacher

STEPS = 4
"""The last is counted: DeepSpeed records what a step needs in the first two and looks some of it up in the third."""
SAMPLES, CLONES, POSITIONS = 2, 2, 16

_COLLECTIVES = {
    "all-reduce": ("allreduce", "allreduce_coalesced"),
    "all-gather": ("allgather", "_allgather_base", "all_gather_single", "allgather_into_tensor_coalesced"),
    "reduce-scatter": ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
    "other": ("broadcast", "reduce", "send", "recv", "alltoall", "alltoall_base", "barrier", "gather", "scatter"),
}
"""Kind -> methods of a process group; names differ between versions of torch."""


def recipe_of(case: dict[str, Any]) -> Recipe:
    """The recipe of a case: a small 2.0 vision model."""
    width = case.get("width", 64)
    model = ModelConfig(
        visible_only=True,
        vision=VisionStem(image_size=16, patch_size=4, positions="sincos"),
        backbone=Backbone(width=width, heads=4, ffn=4 * width, depth=case["depth"]),
        predictor=Predictor(kind="conv2d", width=32, kernel=3, groups=4, layers=2),
        activation_checkpointing=case.get("checkpointing", False),
    )
    accumulation = case.get("accumulation", 1)
    return Recipe(
        model=model,
        objective=ObjectiveConfig(
            masking=MaskingConfig(kind="random", prob=0.75, clones=CLONES),
            target=TargetConfig(top_k_layers=min(8, case["depth"])),
        ),
        teacher=TeacherConfig(placement=case.get("placement", "device")),
        precision=case.get("precision", "bf16"),
        accumulation=accumulation,
        global_batch_size=SAMPLES * accumulation * case["world_size"],
        optim=OptimConfig(decay_on="matrices", clip=1.0),
    )


class Counts:
    """Collectives of this process by kind while `counting`, the teacher's forward passes apart; and groups made."""

    def __init__(self) -> None:
        self.counting = False
        self.prefix = ""
        self.calls: Counter[str] = Counter()
        self.groups: Counter[str] = Counter()
        for kind, names in _COLLECTIVES.items():
            for name in names:
                if hasattr(dist.ProcessGroup, name):
                    self._listen(kind, name)
        self._count_groups()

    def _listen(self, kind: str, name: str) -> None:
        original = getattr(dist.ProcessGroup, name)

        def counted(group: Any, *args: Any, **kwargs: Any) -> Any:
            if self.counting:
                self.calls[self.prefix + kind] += 1
            if kind == "all-gather" and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                found = original(group, *args, **kwargs)
                # Nothing came, and what the memory held before may be no number.
                args[0].normal_(std=0.02)
                return found
            return original(group, *args, **kwargs)

        setattr(dist.ProcessGroup, name, counted)

    def _count_groups(self) -> None:
        original = dist.new_group

        def counted(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
            self.groups["calls"] += 1
            self.groups["own"] += ranks is None or dist.get_rank() in ranks
            return original(ranks, *args, **{**kwargs, "backend": "fake"})

        dist.new_group = distributed_c10d.new_group = counted

    def watch(self, teacher: ShardedTeacher) -> None:
        """Tell this teacher's forward passes apart."""
        run = teacher._run

        def marked(*args: Any) -> Any:
            self.prefix = "teacher "
            try:
                return run(*args)
            finally:
                self.prefix = ""

        teacher._run = marked  # type: ignore[method-assign]


def agree() -> None:
    """Ranks that are not there say what this one says."""

    def gathered(found: list[Any], value: Any, group: Any = None) -> None:
        found[:] = [value] * len(found)

    dist.all_gather_object = gathered
    dist.broadcast_object_list = lambda *_args, **_kwargs: None
    # Nobody adds up what the ranks hold.
    layout_check._raise_everywhere = lambda *_args: None
    from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3, utils

    for module in (utils, partition_parameters, partitioned_param_coordinator, stage3):
        if hasattr(module, "assert_ints_same_as_other_ranks"):
            module.assert_ints_same_as_other_ranks = lambda _ints: None


def batch_of(generator: torch.Generator) -> Batch:
    order = torch.rand(SAMPLES * CLONES, POSITIONS, generator=generator).argsort(1)
    return Batch(
        modality="vision",
        inputs=torch.randn(SAMPLES, 3, 16, 16, generator=generator),
        valid=None,
        masked_rt=order < 12,
        grid=(4, 4),
        sample_ids=torch.arange(SAMPLES),
        keys=("a", "b"),
    )


def start(world_size: int) -> Counts:
    """Form the fake world and listen to it."""
    place = {"RANK": "0", "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place, MASTER_PORT="1")
    groups.prepare_accelerator()
    import deepspeed

    counts = Counts()
    agree()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return counts


def profiled(function: Any) -> tuple[Any, int]:
    """Its result, and how many calls Python made."""
    profile = cProfile.Profile()
    result = profile.runcall(function)
    return result, pstats.Stats(profile).total_calls


def plan(case: dict[str, Any], recipe: Recipe) -> None:
    """What the planner says of one topology."""
    job = Job.of(recipe, {"zero_optimization": case["zero"]}, case["world_size"], ModelSizes.of(recipe))
    memory.budget(job)
    traffic.transfers(job, "vision", 8)
    collectives.collectives(job)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Counts of one case."""
    from d2v_scale.checkpoint.format import describe
    from d2v_scale.checkpoint.training import pieces
    from d2v_scale.pretraining.engines import build_engines

    counts = start(case["world_size"])
    topology, calls_groups = profiled(lambda: groups.initialize(groups.ParallelConfig()))
    recipe = recipe_of(case)
    config = legal.deepspeed_config(recipe, {"zero_optimization": case["zero"]}, case["world_size"], auto="fp32")
    (student, teacher), calls_engines = profiled(lambda: build_engines(recipe, config, topology))
    assert isinstance(teacher, ShardedTeacher)
    counts.watch(teacher)
    generator = torch.Generator().manual_seed(0)

    def step(number: int) -> None:
        batches = [batch_of(generator) for _ in range(recipe.accumulation)]
        result, seen = train_step(student, teacher, batches, recipe.objective, Draw(1, number), observe=False)
        assert result.applied
        observed.append(seen)

    observed: list[Any] = []
    for number in range(STEPS - 1):
        step(number)
    counts.counting = True
    _, calls_step = profiled(lambda: step(STEPS - 1))
    in_step, counts.calls = dict(counts.calls), Counter()
    collapse_statistics(observed[-1], topology)
    teacher.health()
    counts.counting = False
    held, calls_pieces = profiled(lambda: pieces(student, teacher))
    _, calls_plan = profiled(lambda: plan(case, recipe))
    return {
        "collectives": in_step,
        "logging": dict(counts.calls),
        "groups": dict(counts.groups),
        "pieces": len(held),
        "manifest_bytes": len(json.dumps(describe(held))),
        "python_calls": {
            "groups": calls_groups,
            "engines": calls_engines,
            "step": calls_step,
            "pieces": calls_pieces,
            "plan": calls_plan,
        },
    }


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(measure(case)))
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed would take leave of ranks that are not there


if __name__ == "__main__":
    main()
