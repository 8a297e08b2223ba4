"""Cost of the teacher's update against one bare `lerp_` over the same bytes.

One process, this machine's device. One row a case: the update, the least it could cost (one bare `lerp_` over the same
bytes, and in bf16 the cast into the compute copy), and their ratio. Rounds alternate; the fastest of each counts.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from d2v_scale.data2vec.config import TargetConfig
from d2v_scale.model.config import Backbone, ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.model.stem_config import VisionStem
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel import ds_config, groups
from d2v_scale.parallel.zero import StudentEngine, build_student
from d2v_scale.teacher.config import TeacherConfig
from d2v_scale.teacher.sharded import ShardedTeacher

DECAY = 0.999


def fastest(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of the fastest round of each function, taken in turns."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for index, function in enumerate(functions):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[index] = min(best[index], time.perf_counter() - begin)
    return best


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py teacher`."""
    parser.add_argument("--width", type=int, default=512, help="channels of the model")
    parser.add_argument("--depth", type=int, default=8, help="blocks of the model")
    parser.add_argument("--rounds", type=int, default=30, help="repetitions of each case")


def run(options: argparse.Namespace) -> int:
    """Print the rows."""
    topology = groups.single_process()
    width = options.width
    backbone = Backbone(width=width, heads=8, ffn=4 * width, depth=options.depth, norm_first=True)
    model = ModelConfig(vision=VisionStem(image_size=32, patch_size=4), backbone=backbone)
    parts = TeacherParts(with_predictor=True)
    for precision in ("fp32", "bf16"):
        for placement in ("device", "cpu"):
            for stage in (1, 3):
                raw = {"zero_optimization": {"stage": stage}}
                numbers = ds_config.RecipeNumbers(precision=precision)
                config = ds_config.resolve(raw, numbers, groups.ParallelConfig(), 1)
                student = build_student(
                    lambda: Student(model),
                    config,
                    lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-4),
                    topology,
                    lambda module: initialize(module, 0),
                )
                teacher = ShardedTeacher(
                    lambda: Teacher(model, TargetConfig(), parts),
                    student,
                    TeacherConfig(placement=placement),
                    config,
                    topology,
                    parts.role,
                )
                count = sum(shard.numel for shard in teacher.shards())
                source_dtype = torch.float32 if stage == 3 or precision == "fp32" else torch.bfloat16
                device = teacher.shards()[0].values.device
                values, source = (torch.randn(count, device=device) for _ in range(2))
                source = source.to(source_dtype)
                compute = torch.empty(count, dtype=torch.bfloat16, device=topology.device)

                def update(student: StudentEngine = student, teacher: ShardedTeacher = teacher) -> None:
                    student.completed_updates += 1
                    teacher.update(DECAY)
                    teacher.wait()

                def bare(
                    values: Tensor = values,
                    source: Tensor = source,
                    compute: Tensor = compute,
                    precision: str = precision,
                ) -> None:
                    values.lerp_(source.float(), 1 - DECAY)
                    if precision == "bf16":
                        compute.copy_(values)

                ours, least = fastest([update, bare], options.rounds)
                print(
                    f"{precision} stage {stage} placement {placement:6s} {count / 1e6:6.1f} M parameters  "
                    f"update {ours * 1e3:7.2f} ms  bare {least * 1e3:7.2f} ms  {ours / least:.2f}x",
                    flush=True,
                )
                teacher.destroy()
                student.destroy()
    groups.shutdown()
    return 0
