"""The student and the teacher of a recipe, in the engines that a topology calls for."""

import logging
from typing import Any, cast

import torch

from d2v_scale.errors import CheckpointError
from d2v_scale.interop.encoder_source import EncoderSource
from d2v_scale.interop.remote_code import MASKING
from d2v_scale.model.init import initialize
from d2v_scale.model.layers import Section
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.optim import make_optimizer, parameter_groups
from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.pipeline import build_pipeline
from d2v_scale.parallel.shards import global_shapes, part_of
from d2v_scale.parallel.zero import NamedParameters, StudentEngine, build_student
from d2v_scale.planning.stages import StageSplit, even_bubble, stage_blocks
from d2v_scale.recipe import Recipe
from d2v_scale.teacher.sharded import EmaTeacher, ShardedTeacher
from d2v_scale.teacher.stage import StageTeacher

log = logging.getLogger("d2v_scale.train")


def build_engines(recipe: Recipe, config: dict[str, Any], topology: Topology) -> tuple[StudentEngine, EmaTeacher]:
    """Both engines, with initial weights; `config` is DeepSpeed's, resolved. Collective: all ranks must call."""
    parts, targets, widths = recipe.parts(), recipe.targets(), recipe.target_widths()

    def optimizer(named: NamedParameters) -> Any:
        return make_optimizer(parameter_groups(named, recipe.optim), recipe.optim)

    if topology.pipeline_size == 1:
        student = build_student(
            lambda: Student(recipe.model, target_widths=widths),
            config,
            optimizer,
            topology,
            lambda module: initialize(module, recipe.seed),
        )
        sharded = ShardedTeacher(
            lambda: Teacher(recipe.teacher.model_beside(recipe.model), targets, parts),
            student,
            recipe.teacher,
            config,
            topology,
            parts.role,
        )
        cast(Teacher, sharded.module).begin_state(topology.device)
        return student, sharded
    split = stage_blocks(recipe, topology.pipeline_size, topology.tensor_size)
    if topology.rank == 0:
        log.info("%s", describe_split(split, recipe.accumulation))
    blocks = split.blocks[topology.pipeline_rank]
    section = Section(blocks.start, blocks.stop, recipe.model.backbone.depth)
    stage = build_pipeline(
        lambda: Student(recipe.model, section=section, target_widths=widths),
        config,
        optimizer,
        topology,
        lambda module: initialize(module, recipe.seed),
    )
    teacher = StageTeacher(
        lambda: Teacher(recipe.model, targets, parts, section), stage, recipe.teacher, config, topology, parts.role
    )
    cast(Teacher, teacher.module).begin_state(topology.device)
    return stage, teacher


@torch.no_grad()
def read_encoder(teacher: EmaTeacher, source: EncoderSource) -> None:
    """Give a teacher that is another model the weights of an encoder. Local.

    Raises CheckpointError when one is nowhere to be found, or of another shape.
    """
    shapes = global_shapes(teacher.module, teacher.topology.tensor_size)
    for held in teacher.shards():
        tensor = source.read(held.name)
        if tensor is None and held.name.endswith(MASKING):
            held.values.zero_()  # an exported encoder may lack it, and nothing is hidden from a teacher
            continue
        if tensor is None or tuple(tensor.shape) != shapes[held.name]:
            found = "lacks it" if tensor is None else f"has {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{source.path}: {held.name} of the teacher has the shape {shapes[held.name]}; the file {found}."
            )
        held.values.copy_(part_of(tensor, held.slice, held.start, held.numel))
    teacher.finish_loading(0)


def describe_split(split: StageSplit, micro_batches: int) -> str:
    """The stages, their shares of the work, and how much of a step they will wait."""
    stages = ", ".join(
        f"{number}: blocks {blocks.start}-{blocks.stop - 1} ({share:.0%})"
        for number, (blocks, share) in enumerate(zip(split.blocks, split.shares, strict=True))
    )
    even = even_bubble(len(split.blocks), micro_batches)
    few = " Few micro-batches: raise `accumulation` to wait less." if micro_batches < 2 * len(split.blocks) else ""
    return (
        f"Pipeline stages {stages}; predicted idle share {split.bubble(micro_batches):.0%}, "
        f"{even:.0%} = (p-1)/(m+p-1) if stages were equal.{few}"
    )


def describe_idle(shares: list[float], micro_batches: int) -> str:
    """The measured idle share of every stage (`StudentEngine.idle_shares`) beside what equal stages would have."""
    stages = ", ".join(f"{stage}: {share:.0%}" for stage, share in enumerate(shares))
    even = even_bubble(len(shares), micro_batches)
    return f"Pipeline idle share, measured, of stage {stages}; (p-1)/(m+p-1) = {even:.0%}"
