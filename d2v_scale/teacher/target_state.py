"""The state of targets in a run: where it is, how it moves, and under which names checkpoints have it.

It is not sharded: every data-parallel and tensor-parallel rank of the pipeline stage that makes targets has all of it,
and all the same, in fp32.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from d2v_scale.data2vec.targets import State
from d2v_scale.networks.stack import Teacher
from d2v_scale.teacher.sharded import EmaTeacher


def of(teacher: EmaTeacher) -> dict[str, list[State]]:
    """The states of targets by stem (`Teacher.state`); {}: none has one, or they are made on another stage."""
    state: dict[str, list[State]] = getattr(teacher.module, "state", {})
    return state


@torch.no_grad()
def move(teacher: EmaTeacher, sums: Mapping[str, Sequence[dict[str, Tensor]]]) -> None:
    """Move the states of targets by what this rank's micro-batches said of each (float64, `Target.statistics` added
    up), by stem. Once after each applied optimizer step.

    Collective over the data-parallel group, of which all ranks must call with the same stems, in one all-reduce;
    nothing is waited for.
    """
    said = [x for each in sums.values() for one in each for x in one.values()]
    if not said:
        return
    rest = torch.cat([x.flatten() for x in said])
    teacher.topology.sum_over_replicas(rest)
    for stem, each in sums.items():
        targets = cast(Teacher, teacher.module).targets[stem]
        for target, state, one in zip(targets, of(teacher).get(stem, [{}] * len(each)), each, strict=True):
            whole = {}
            for name, x in one.items():
                part, rest = rest.split([x.numel(), rest.numel() - x.numel()])
                whole[name] = part.view(x.shape)
            moved = target.moved(dict(state), whole) if state else {}
            for name, values in state.items():
                values.copy_(moved[name])


def named(teacher: EmaTeacher) -> dict[str, Tensor]:
    """The states of all targets as `target.STEM.NAME`, of a further one `target.STEM.TARGET.NAME`: the tensors
    themselves, to be read or written."""
    targets = cast(Teacher, teacher.module).targets if of(teacher) else {}
    found: dict[str, Tensor] = {}
    for stem, states in of(teacher).items():
        for number, (target, state) in enumerate(zip(targets[stem], states, strict=True)):
            prefix = f"target.{stem}.{target.config.called}" if number else f"target.{stem}"
            found |= {f"{prefix}.{name}": x for name, x in state.items()}
    return found


def shapes(teacher: EmaTeacher) -> dict[str, tuple[int, ...]]:
    """The shapes of `named`, on every rank. Collective in a pipeline."""
    return teacher.student.over_stages({name: tuple(x.shape) for name, x in named(teacher).items()})
