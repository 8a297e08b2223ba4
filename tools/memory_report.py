"""Bytes that every rank holds, measured: `python tools/memory_report.py [--worlds 1 2 4] [--width 192] [--depth 6]`.

Starts a small vision model on 1, 2 and 4 processes of this machine, takes one step, and prints the storage of real
tensors per parameter of the model: weights, gradients, optimizer, teacher; what is in host memory is marked. Beside
the sharded teacher stands what a replicated one costs (4 bytes, and 2 more for a bf16 copy). Exit code 1 when the
teacher's share differs by more than 5 % from 4/W bytes per parameter plus 2/W for its bf16 copy.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

TOLERANCE = 0.05
CASES = [
    (stage, precision, placement)
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16")
    for placement in ("device", "cpu")
    if stage != 2 or precision == "bf16"
]


def measure(width: int, depth: int) -> None:
    """One rank: print a JSON line per case."""
    import torch

    from d2v_scale.batch import Batch, masked_targets
    from d2v_scale.data2vec.config import ObjectiveConfig, TargetConfig
    from d2v_scale.model.config import Backbone, ModelConfig
    from d2v_scale.model.init import initialize
    from d2v_scale.model.stem_config import VisionStem
    from d2v_scale.model.teacher_parts import TeacherParts
    from d2v_scale.networks.draw import Draw
    from d2v_scale.networks.stack import Student, Teacher
    from d2v_scale.parallel import ds_config, groups
    from d2v_scale.parallel.shards import global_shapes
    from d2v_scale.parallel.zero import build_student
    from d2v_scale.teacher.config import TeacherConfig
    from d2v_scale.teacher.held_bytes import held_bytes
    from d2v_scale.teacher.sharded import ShardedTeacher

    topology = groups.initialize()
    backbone = Backbone(width=width, heads=4, ffn=4 * width, depth=depth, norm_first=True, key_bias=False)
    model = ModelConfig(vision=VisionStem(image_size=16, patch_size=4), backbone=backbone)
    parts = TeacherParts(with_predictor=True)
    objective = ObjectiveConfig(target=TargetConfig(tap="block", top_k_layers=2))
    generator = torch.Generator().manual_seed(topology.rank)
    for stage, precision, placement in CASES:
        # A small reduce bucket: DeepSpeed's buffers are no class of their own here.
        raw = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}}
        numbers = ds_config.RecipeNumbers(precision=precision, global_batch_size=2 * topology.world_size)
        config = ds_config.resolve(raw, numbers, groups.ParallelConfig(), topology.world_size)
        student = build_student(
            lambda: Student(model),
            config,
            lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-4),
            topology,
            lambda module: initialize(module, 0),
        )
        teacher = ShardedTeacher(
            lambda: Teacher(model, objective.target, parts),
            student,
            TeacherConfig(placement=placement),
            config,
            topology,
            parts.role,
        )
        masked = torch.rand(2, 16, generator=generator) < 0.5
        masked[:, 0] = True
        images = torch.randn(2, 3, 16, 16, generator=generator)
        batch = Batch(
            modality="vision",
            inputs=images.to(topology.device),
            valid=None,
            masked_rt=masked.to(topology.device),
            sample_ids=torch.arange(2, device=topology.device),
            grid=(4, 4),
            extra_tokens=1,
        )
        for _ in range(2):
            output = student(batch, Draw(seed=0, step=0))
            targets = masked_targets(teacher(batch, output.features_btd), batch)
            student.backward((output.predictions_nd.float() - targets).square().mean())
            held = held_bytes(student, teacher)
            if student.step().applied:
                teacher.update(0.99)
        held["parameters"] = sum(torch.Size(s).numel() for s in global_shapes(student.module, 1).values())
        held["teacher parameters"] = sum(torch.Size(s).numel() for s in global_shapes(teacher.module, 1).values())
        everyone: list = [None] * topology.world_size
        torch.distributed.all_gather_object(everyone, held)
        if topology.rank == 0:
            print("REPORT" + json.dumps([stage, precision, placement, everyone]), flush=True)
        teacher.destroy()
        student.destroy()
    groups.shutdown()


def launch(world_size: int, width: int, depth: int) -> list[list]:
    """Run `measure` on some processes; the cases with every rank's bytes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in env.items()}}
        command = [sys.executable, __file__, "--measure", "--width", str(width), "--depth", str(depth)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"ranks of world size {world_size} ended with {[p.returncode for p in ranks]}")
    return [json.loads(line[6:]) for line in outputs[0].splitlines() if line.startswith("REPORT")]


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="world sizes")
    parser.add_argument("--width", type=int, default=192, help="channels of the model")
    parser.add_argument("--depth", type=int, default=6, help="blocks of the model")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.width, options.depth)
        return 0
    print("Bytes per parameter on the rank that holds most (h: in host memory). Teacher: per parameter of the teacher.")
    heading = "world stage  dtype  placement  weights  gradients  optimizer"
    print(heading + "  teacher fp32  compute  replicated  expected  diff")
    worst = 0.0
    for world_size in options.worlds:
        for stage, precision, placement, ranks in launch(world_size, options.width, options.depth):
            count, own = ranks[0]["parameters"], ranks[0]["teacher parameters"]

            def most(name: str, by: int, ranks: list[dict] = ranks) -> float:
                return max(rank[name] for rank in ranks) / by

            fp32, compute = most("teacher fp32", own), most("teacher compute", own)
            copy = 2 if precision == "bf16" else 0
            expected = (4 + copy) / world_size
            difference = (fp32 + compute) / expected - 1
            worst = max(worst, abs(difference))
            host = "h" if placement == "cpu" else " "
            print(
                f"{world_size:5d} {stage:5d}  {precision:>5s}  {placement:>9s}  {most('weights', count):7.2f}  "
                f"{most('gradients', count):9.2f}  {most('master and moments', count):9.2f}  {fp32:11.3f}{host}  "
                f"{compute:7.3f}  {4 + copy:10d}  {expected:8.3f}  {difference:+.1%}"
            )
    print(f"largest difference of the teacher from 4/W (+ 2/W in bf16): {worst:.1%}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
