"""One rank: every small model in the ZeRO engines at stages 1 and 3, against a plain loop in one process.

Arguments: file of the recording, tensor-parallel size, ZeRO stages.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_models
import torch
from torch import Tensor, nn

from d2v_scale.batch import Batch
from d2v_scale.data2vec import loss
from d2v_scale.data2vec.config import LossConfig
from d2v_scale.modalities import published_parts
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel import ds_config, groups
from d2v_scale.parallel.zero import build_student
from d2v_scale.teacher.config import TeacherConfig
from d2v_scale.teacher.sharded import ShardedTeacher

STEPS = 4
SAMPLES = 4
DECAY = 0.9


def config_of(name: str) -> ModelConfig:
    """Drop path in all, layer drop and recomputation in some."""
    config = tiny_models.model(name, drop_path=0.3, layer_drop=0.4 if name == "v1_speech" else 0.0)
    config.activation_checkpointing = name in ("v1_vision", "v2_speech")
    return config


def batch_of(name: str) -> Batch:
    return tiny_models.batch(name, samples=SAMPLES, clones=1 if name == "v1_text" else 2, padded=True)


def part_of(batch: Batch, rank: int, size: int) -> Batch:
    share = SAMPLES // size
    rows, samples = share * batch.clones, slice(rank * share, (rank + 1) * share)
    return dataclasses.replace(
        batch,
        inputs=batch.inputs[samples],
        valid=None if batch.valid is None else batch.valid[samples],
        student_inputs=None if batch.student_inputs is None else batch.student_inputs[samples],
        masked_rt=batch.masked_rt[rank * rows : (rank + 1) * rows],
        sample_ids=batch.sample_ids[samples],
        layout=None,
    )


def optimizer_of(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    # A large epsilon: Adam turns the rounding noise of gradients that should be 0 into steps of full size.
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)


def loss_sum(batch: Batch, predictions_nd: Tensor, targets_btd: Tensor) -> Tensor:
    targets_nd = targets_btd.repeat_interleave(batch.clones, dim=0).flatten(0, 1)[batch.layout.masked_n]
    return loss.masked_loss_sum(predictions_nd, targets_nd, LossConfig(), targets_nd.shape[1])


def plain_losses(name: str) -> Tensor:
    """The loop without any engine: losses of STEPS steps, whose teacher follows the student."""
    config = config_of(name)
    parts = published_parts(config)
    student, teacher = Student(config), Teacher(config, tiny_models.target_of(name), parts)
    for stack in (student, teacher):
        initialize(stack, 1)
    optimizer = optimizer_of(list(student.parameters()))
    batch = batch_of(name)
    weights = dict(student.named_parameters())
    losses = []
    for step in range(STEPS):
        out = student(batch, Draw(5, step))
        value = loss_sum(batch, out.predictions_nd, teacher(batch, out.features_btd)) / batch.layout.masked_n.numel()
        optimizer.zero_grad(set_to_none=False)
        for parameter in student.parameters():
            # A dropped block's gradient is zero, not absent: its moments decay.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        value.backward()
        optimizer.step()
        losses.append(value.detach())
        with torch.no_grad():
            for key, parameter in teacher.named_parameters():
                parameter.lerp_(weights[key], 1 - DECAY if parts.role(key) == "averaged" else 1.0)
    return torch.stack(losses)


def engine_losses(name: str, stage: int, topology: groups.Topology) -> Tensor:
    """The same through the engines; the sum over ranks is the loss."""
    config = config_of(name)
    parts = published_parts(config)
    numbers = ds_config.RecipeNumbers(precision="fp32")
    parallel = groups.ParallelConfig(tensor=topology.tensor_size)
    resolved = ds_config.resolve({"zero_optimization": {"stage": stage}}, numbers, parallel, topology.world_size)
    engine = build_student(
        lambda: Student(config),
        resolved,
        lambda named: optimizer_of([parameter for _, parameter in named]),
        topology,
        lambda module: initialize(module, 1),
    )
    teacher = ShardedTeacher(
        lambda: Teacher(config, tiny_models.target_of(name), parts),
        engine,
        TeacherConfig(),
        resolved,
        topology,
        parts.role,
    )
    whole = batch_of(name)
    batch = part_of(whole, topology.data_parallel_rank, topology.data_parallel_size)
    losses = []
    for step in range(STEPS):
        out = engine(batch, Draw(5, step))
        value = loss_sum(batch, out.predictions_nd, teacher(batch, out.features_btd)) / whole.layout.masked_n.numel()
        engine.backward(value * topology.data_parallel_size)
        assert engine.step().applied
        teacher.update(DECAY)
        losses.append(value.detach())
    total = torch.stack(losses)
    torch.distributed.all_reduce(total, group=topology.data_parallel_group)
    teacher.destroy()
    engine.destroy()
    return total


def main() -> None:
    recording, tensor, *stages = sys.argv[1:]
    topology = groups.initialize(groups.ParallelConfig(tensor=int(tensor)))
    try:
        reference = torch.load(recording, weights_only=True)
        for name in tiny_models.NAMES:
            for stage in map(int, stages):
                ours = engine_losses(name, stage, topology)
                difference = float(((ours - reference[name]) / reference[name]).abs().max())
                print(f"{name} stage {stage}: largest relative difference {difference:.1e}", flush=True)
                assert difference < 2e-5, (name, stage, ours, reference[name])
        print("all cases agree", flush=True)
    finally:
        groups.shutdown()


if __name__ == "__main__":
    main()
