"""One rank of the cases that plans are compared with: bytes held, and bytes given to collectives in one step.

    plan_worker.py CASES.json OUT.json

A case: name, tensor, pipeline, zero (the JSON's `zero_optimization`), precision, placement, accumulation, clones,
checkpointing, pairs.
Rank 0 writes for every case what each rank held and what each rank communicated.
"""

import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe import schedule
from megatron.core import parallel_state
from rank_cases import take_down_groups

from d2v_scale.batch import Batch
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.paired import joined
from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig, TargetConfig
from d2v_scale.model.config import Backbone, ModelConfig, Predictor
from d2v_scale.model.stem_config import TextStem, VisionStem
from d2v_scale.networks.draw import Draw
from d2v_scale.optim import MuonConfig, OptimConfig
from d2v_scale.parallel import ds_config, groups
from d2v_scale.parallel.pipeline import PipelineStudent
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Recipe
from d2v_scale.teacher.config import TeacherConfig
from d2v_scale.teacher.held_bytes import held_bytes
from d2v_scale.teacher.sharded import EmaTeacher, ShardedTeacher

SAMPLES, CLONES, KEPT, TOKENS = 2, 3, 4, 16
"""Of each micro-batch and data-parallel rank; patches kept of 16; tokens of a text, of which as many are kept."""


def recipe_of(case: dict[str, Any], world_size: int) -> Recipe:
    """The recipe that a case trains: a small 2.0 model of images, or of images beside texts (`pairs`)."""
    backbone = Backbone(width=128, heads=4, ffn=512, depth=4, prenet_depth=1)
    decoder = Predictor(kind="conv2d", width=64, kernel=3, groups=4, layers=2)
    model = ModelConfig(
        visible_only=True,
        vision=VisionStem(image_size=16, patch_size=4, positions="sincos"),
        backbone=backbone,
        predictor=decoder,
        activation_checkpointing=case.get("checkpointing", False),
    )
    data = DataConfig()
    if case.get("pairs"):
        assert model.vision is not None
        model.text = TextStem(vocab_size=40, max_positions=TOKENS, mask_id=39, paired=True)
        model.vision.paired, model.predictor.kind = True, "conv1d"
        data.sources = [SourceConfig(shards="none", modality="vision+text")]
    parallel = groups.ParallelConfig(tensor=case.get("tensor", 1), pipeline=case.get("pipeline", 1))
    accumulation = case.get("accumulation", 1)
    return Recipe(
        model=model,
        data=data,
        objective=ObjectiveConfig(
            masking=MaskingConfig(kind="random", prob=0.75, clones=case.get("clones", CLONES)),
            target=TargetConfig(top_k_layers=3),
        ),
        teacher=TeacherConfig(placement=case.get("placement", "device")),
        precision=case["precision"],
        parallel=parallel,
        accumulation=accumulation,
        global_batch_size=SAMPLES * accumulation * groups.data_parallel_size(parallel, world_size),
        optim=OptimConfig(decay_on="matrices", muon=MuonConfig() if case.get("muon") else None),
    )


def zero_of(case: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's JSON of a case."""
    small = {"stage3_param_persistence_threshold": 1000, "reduce_bucket_size": 200_000}
    return {"zero_optimization": {**small, **case["zero"]}}


class Traffic:
    """Bytes that a ring sends from this rank, by kind of collective, while `counting`.

    Those of the teacher's forward pass have `teacher` before their kind.
    """

    def __init__(self) -> None:
        self.counting = False
        self._prefix = ""
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
                others = 1 if name == "send" else (count - 1) / count
                self.sent[self._prefix + name] += passes * _bytes(args[whole]) * others
            return original(group, *args, **kwargs)

        setattr(dist.ProcessGroup, name, counted)

    def watch(self, teacher: EmaTeacher) -> None:
        """Tell this teacher's forward passes apart. In a pipeline there are none."""
        if not isinstance(teacher, ShardedTeacher):
            return
        run = teacher._run

        def marked(*args: Any) -> Any:
            self._prefix = "teacher "
            found = run(*args)
            self._prefix = ""
            return found

        teacher._run = marked  # type: ignore[method-assign]


# Name; how often a ring passes the whole; which argument is the whole, output or input.
_COLLECTIVES = [
    ("allreduce", 2.0, 0),
    ("send", 1.0, 0),
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


def pairs_of(generator: torch.Generator, clones: int) -> Batch:
    """One micro-batch of images beside texts."""
    order = torch.rand(SAMPLES * clones, TOKENS, generator=generator).argsort(1)
    texts = Batch(
        modality="text",
        inputs=torch.randint(4, 39, (SAMPLES, TOKENS), generator=generator),
        valid=None,
        masked_rt=order >= KEPT,
        sample_ids=torch.arange(SAMPLES),
    )
    parts = tuple(replace(part, source=f"pairs/{part.modality}") for part in (batch_of(generator, clones), texts))
    return joined(parts, "vision+text", source="pairs")


def batch_of(generator: torch.Generator, clones: int) -> Batch:
    """One micro-batch."""
    order = torch.rand(SAMPLES * clones, 16, generator=generator).argsort(1)
    return Batch(
        modality="vision",
        inputs=torch.randn(SAMPLES, 3, 16, 16, generator=generator),
        valid=None,
        masked_rt=order >= KEPT,
        sample_ids=torch.arange(SAMPLES),
        grid=(4, 4),
        extra_tokens=1,
    )


def before_update(student: StudentEngine, call: Callable[[], None]) -> None:
    """Call when the gradients of a step are complete. In a pipeline the optimizer's own hook comes too late."""
    if not isinstance(student, PipelineStudent):
        student.before_step.append(call)
        return
    instructions = student.engine._INSTRUCTION_MAP
    reduce = instructions[schedule.ReduceGrads]

    def reduce_and_call(engine: Any) -> None:
        reduce(engine)
        call()

    student.engine._INSTRUCTION_MAP = {**instructions, schedule.ReduceGrads: reduce_and_call}


def measure(case: dict[str, Any], traffic: Traffic) -> dict[str, Any]:
    """Three steps: DeepSpeed learns the order of modules in the first two, and the last one is measured."""
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    recipe = recipe_of(case, world_size)
    topology = groups.initialize(recipe.parallel)
    numbers = ds_config.RecipeNumbers(
        precision=case["precision"], accumulation=recipe.accumulation, global_batch_size=recipe.global_batch_size
    )
    config = ds_config.resolve(zero_of(case), numbers, recipe.parallel, world_size)
    student, teacher = build_engines(recipe, config, topology)
    student.module.train()
    traffic.watch(teacher)
    generator = torch.Generator().manual_seed(topology.data_parallel_rank)
    held: dict[str, int] = {}
    before_update(student, lambda: held.update(held_bytes(student, teacher)))
    for step in range(3):
        traffic.counting = step == 2
        made = pairs_of if case.get("pairs") else batch_of
        batches = [made(generator, recipe.objective.masking.clones) for _ in range(recipe.accumulation)]
        result, _ = train_step(student, teacher, batches, recipe.objective, Draw(seed=0, step=step), observe=False)
        assert result.applied
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
    for _, alike in itertools.groupby(cases, key=lambda case: (case.get("tensor", 1), case.get("pipeline", 1))):
        if parallel_state.model_parallel_is_initialized():
            # Other groups in the same processes: a launch costs more than a case.
            take_down_groups()
        done += [measure(case, traffic) for case in alike]
    if dist.get_rank() == 0:
        out.write_text(json.dumps(done))
    groups.shutdown()


if __name__ == "__main__":
    main()
