"""Runs cases on one rank (`engine_worker.py CASES.json`); each ends in a checkpoint for the test to read.

With `save_at` it also saves after that step, and goes on with the same engines.
"""

import json
import sys
from pathlib import Path

import tiny_model
import torch
import torch.distributed as dist
import toy_model as toy
from rank_cases import ending_together
from torch import Tensor

from d2v_scale.checkpoint import Checkpoint, training
from d2v_scale.checkpoint.config import CheckpointConfig
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.parallel import ds_config, groups, zero
from d2v_scale.pretraining.diagnostics import StepDiagnostics
from d2v_scale.teacher.config import TeacherConfig
from d2v_scale.teacher.sharded import ShardedTeacher

SETTINGS = toy.Settings()


def build(case: dict, topology: groups.Topology) -> tuple[zero.StudentEngine, ShardedTeacher]:
    raw = {**case.get("json", {}), "zero_optimization": {"stage": case["stage"], **case.get("zero", {})}}
    numbers = ds_config.RecipeNumbers(
        precision=case.get("precision", "fp32"),
        accumulation=case.get("accumulation", 1),
        clip=SETTINGS.clip,
        global_batch_size=12,
    )
    parallel = groups.ParallelConfig(tensor=topology.tensor_size)
    config = ds_config.resolve(raw, numbers, parallel, topology.world_size)
    kind = tiny_model if case.get("model") == "real" else toy
    student = zero.build_student(
        kind.Student, config, lambda named: toy.optimizer(named, SETTINGS), topology, kind.initialize
    )
    place = TeacherConfig(placement=case.get("placement", "device"))
    return student, ShardedTeacher(kind.Teacher, student, place, config, topology, kind.role)


def rows(topology: groups.Topology, accumulation: int, micro: int) -> slice:
    size = 12 // (topology.data_parallel_size * accumulation)
    first = (micro * topology.data_parallel_size + topology.data_parallel_rank) * size
    return slice(first, first + size)


def poisoned(loss: Tensor, student: zero.StudentEngine, poison: dict | None, step: int, micro: int) -> Tensor:
    """Spoil the loss, or the gradient, of one rank's last micro-batch."""
    if poison is None or step != poison["step"] or micro != student.accumulation - 1:
        return loss
    if dist.get_rank() != poison["rank"]:
        return loss
    value = float(poison["value"])
    if poison["kind"] == "constant":
        return loss + value
    handle = loss.register_hook(lambda gradient: gradient * value)
    assert handle is not None
    return loss


def train(
    case: dict, steps: range, student: zero.StudentEngine, teacher: ShardedTeacher
) -> tuple[list[float], list[float], dict[str, float]]:
    kind = tiny_model if case.get("model") == "real" else toy
    topology, losses, norms, parts = student.topology, [], [], {}
    diagnostics = StepDiagnostics(student, depth=2 if case.get("model") == "real" else 3)
    for step in steps:
        total = torch.zeros(())
        count = kind.count(step)
        before = bits(student, teacher) if "poison" in case else None
        for micro in range(student.accumulation):
            part = rows(topology, student.accumulation, micro)
            loss = kind.loss(student, teacher, step, part, bf16=case.get("precision") == "bf16")
            total += loss.detach()
            scaled = loss * (topology.data_parallel_size * student.accumulation / count)
            student.backward(poisoned(scaled, student, case.get("poison"), step, micro))
        diagnostics.arm()
        result = student.step()
        if result.applied:
            check_update(case, teacher, case.get("decay", SETTINGS.decay))
            norms.append(result.grad_norm)
            parts = {name: float(value) for name, value in diagnostics.figures(result.grad_norm).items()}
        elif before is not None:
            assert step == case["poison"]["step"], f"step {step} was skipped"
            assert bits(student, teacher) == before, "a skipped step changed something"
            assert student.skipped_in_a_row == 1
        dist.all_reduce(total, group=topology.data_parallel_group)
        losses.append(float(total / count))
    return losses, norms, parts


def bits(student: zero.StudentEngine, teacher: ShardedTeacher) -> list[bytes]:
    """Everything a step may change, bit by bit."""
    tensors = []
    for shard in student.shards():
        moments = [shard.moment(student.optimizer, key) for key in ("exp_avg", "exp_avg_sq")]
        tensors += [shard.weight, *(m for m in moments if m is not None)]
    if student.stage < 3:
        tensors += [p.data.float() for p in student.module.parameters()]
    else:
        tensors += [p.ds_tensor.float() for p in student.module.parameters() if p.ds_tensor.numel() == p.ds_numel]
    for held in teacher.shards():
        tensors += [held.values] + ([] if held.compute is None else [held.compute.float()])
    return [t.detach().contiguous().numpy().tobytes() for t in tensors] + [str(student.adam_steps()).encode()]


def check_update(case: dict, teacher: ShardedTeacher, decay: float) -> None:
    """The update is the recurrence on the student's values, exactly, and talks to no one."""
    shards = teacher.shards()
    expected = []
    for held in shards:
        source = held.source.float()
        moved = torch.lerp(held.values, source, 1 - decay) if held.averaged else source
        expected.append((held.values if decay >= 1 else moved).clone())
    if case.get("count_collectives"):
        with torch.profiler.profile() as profile:
            teacher.update(decay)
        names = {event.key for event in profile.key_averages()}
        assert not [n for n in names if "c10d" in n or "gloo" in n], names
        with torch.profiler.profile() as profile:
            teacher(toy.sample(0, slice(0, 1))[0])
        assert [e.key for e in profile.key_averages() if "c10d" in e.key or "gloo" in e.key], "the control saw nothing"
    else:
        teacher.measure()
        teacher.update(decay)
    for held, wanted in zip(shards, expected, strict=True):
        assert torch.equal(held.values, wanted), held.name
        if held.compute is not None:
            assert torch.equal(held.compute, wanted.to(held.compute.dtype)), held.name


def run(case: dict, topology: groups.Topology) -> None:
    student, teacher = build(case, topology)
    if "load" in case:
        # Weights that were used before: gathered parameters must not serve their old values.
        train(case, range(*case.get("warm_up", [0, 0])), student, teacher)
        source = Checkpoint.open(case["load"])
        if case.get("weights_only"):
            training.restore_weights(source, student, teacher, reset_teacher=case.get("reset_teacher", False))
        else:
            training.restore(source, student, teacher)
    writer = CheckpointWriter.create(Path(case["out"]), CheckpointConfig(peer_timeout=30))
    first, last = case["steps"]
    ends = sorted({case.get("save_at", last), last})
    losses: list[float] = []
    norms: list[float] = []
    for begin, end in zip([first, *ends], ends, strict=False):
        new_losses, new_norms, parts = train(case, range(begin, end), student, teacher)
        losses, norms = losses + new_losses, norms + new_norms
        health = {name: float(value) for name, value in teacher.health().items()}
        extra = {"losses": losses, "norms": norms, "health": health, "parts": parts}
        writer.save(end, training.pieces(student, teacher), training.state(student, teacher), extra)
    assert writer.finish(), writer.poll()
    teacher.destroy()
    student.destroy()


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    topology = groups.initialize(groups.ParallelConfig(tensor=cases[0].get("tensor", 1)))
    for case in cases:
        with ending_together(case, topology):
            run(case, topology)
    groups.shutdown()


if __name__ == "__main__":
    main()
