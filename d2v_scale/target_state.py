"""The state of targets in a run: where it is, how it moves, and under which names checkpoints have it.

It is not sharded: every data-parallel and tensor-parallel rank of the pipeline stage that makes targets has all of it,
and all the same, in fp32.
"""

from typing import cast

import torch
from torch import Tensor

from d2v_scale.data2vec.targets import State
from d2v_scale.model.config import Modality
from d2v_scale.model.stack import Teacher
from d2v_scale.teacher import EmaTeacher


def of(teacher: EmaTeacher) -> dict[Modality, State]:
    """The state of targets by stem (`Teacher.state`); {}: none has one, or they are made on another stage."""
    state: dict[Modality, State] = getattr(teacher.module, "state", {})
    return state


@torch.no_grad()
def move(teacher: EmaTeacher, stem: Modality, sums: dict[str, Tensor]) -> None:
    """Move the state of a stem's targets by what this rank's micro-batches said (float64, `Target.statistics` added
    up). Once after each applied optimizer step.

    Collective over the data-parallel group, of which all ranks must call; nothing is waited for.
    """
    packed = torch.cat([x.flatten() for x in sums.values()])
    teacher.topology.sum_over_replicas(packed)
    parts = packed.split([x.numel() for x in sums.values()])
    whole = {name: part.view(x.shape) for (name, x), part in zip(sums.items(), parts, strict=True)}
    state = of(teacher)[stem]
    moved = cast(Teacher, teacher.module).targets[stem].moved(dict(state), whole)
    for name, values in state.items():
        values.copy_(moved[name])


def named(teacher: EmaTeacher) -> dict[str, Tensor]:
    """The state of all targets as `target.STEM.NAME`: the tensors themselves, to be read or written."""
    return {f"target.{stem}.{name}": x for stem, state in of(teacher).items() for name, x in state.items()}


def shapes(teacher: EmaTeacher) -> dict[str, tuple[int, ...]]:
    """The shapes of `named`, on every rank. Collective in a pipeline."""
    return teacher.student.over_stages({name: tuple(x.shape) for name, x in named(teacher).items()})
