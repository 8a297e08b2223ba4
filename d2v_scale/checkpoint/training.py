"""The training state of the engines, to a checkpoint and back. Fine-tuning has no teacher."""

from typing import Any

import torch

from d2v_scale.checkpoint.format import Piece
from d2v_scale.checkpoint.reader import Checkpoint
from d2v_scale.errors import CheckpointError
from d2v_scale.parallel.shards import MOMENTS, TensorSlice
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.teacher import target_state
from d2v_scale.teacher.sharded import EmaTeacher


def pieces(student: StudentEngine, teacher: EmaTeacher | None) -> list[Piece]:
    """Views of everything this rank contributes to a checkpoint. Local.

    Asserts that student, teacher and Adam agree on the number of updates.
    """
    updates = student.completed_updates
    assert student.adam_steps() == {updates}, f"Adam at {student.adam_steps()}, student at {updates}"
    found = []
    for shard in student.shards():
        if _writes(shard.slice, student.topology.tensor_rank):
            found.append(Piece("student", shard.name, shard.shape, shard.slice, shard.start, shard.weight))
            for key in student.moments_of(shard.master):
                moment = shard.moment(student.optimizer, key)
                values = torch.zeros(shard.numel) if moment is None else moment
                found.append(Piece(key, shard.name, shard.shape, shard.slice, shard.start, values))
    if teacher is None:
        return found
    assert teacher.completed_updates == updates, f"teacher at {teacher.completed_updates}, student at {updates}"
    for held in teacher.shards():
        if _writes(held.slice, teacher.topology.tensor_rank):
            found.append(Piece("teacher", held.name, held.shape, held.slice, held.start, held.values))
    if teacher.topology.data_parallel_rank == 0 and teacher.topology.tensor_rank == 0:
        # All ranks that have it have the same.
        named = target_state.named(teacher).items()
        found += [Piece("state", name, tuple(x.shape), None, 0, x.reshape(-1)) for name, x in named]
    return found


def state(student: StudentEngine, teacher: EmaTeacher | None) -> dict[str, Any]:
    """The engines' counters."""
    counters = {
        "completed_updates": student.completed_updates,
        "skipped_updates": student.skipped_updates,
        "skipped_in_a_row": student.skipped_in_a_row,
        "muon": student.matrices is not None,
    }
    return counters if teacher is None else counters | {"teacher_updates": teacher.completed_updates}


@torch.no_grad()
def restore(checkpoint: Checkpoint, student: StudentEngine, teacher: EmaTeacher | None) -> None:
    """Continue a run: weights, moments, teacher and counters, at any world size, stage and placement. Collective.

    Raises CheckpointError, before anything is changed, when the checkpoint is of another model.
    """
    counters = checkpoint.manifest.state
    if (was := bool(counters.get("muon"))) != (student.matrices is not None):
        raise CheckpointError(
            f"{checkpoint.path} has the moments of a run {'with' if was else 'without'} Muon.",
            "Leave optim.muon as it was, or begin a new run from its weights with --init_from.",
        )
    _check(checkpoint, student, teacher, MOMENTS)
    _read_student(checkpoint, student, MOMENTS)
    student.finish_loading(counters["completed_updates"], counters["skipped_updates"])
    student.skipped_in_a_row = counters["skipped_in_a_row"]
    if teacher is not None:
        _read_teacher(checkpoint, teacher)
        _read_state(checkpoint, teacher)
        teacher.finish_loading(counters["teacher_updates"])


@torch.no_grad()
def restore_weights(
    checkpoint: Checkpoint, student: StudentEngine, teacher: EmaTeacher, reset_teacher: bool = False
) -> None:
    """Start a new run from weights: no moments, counters at zero. Collective.

    The teacher is the checkpoint's, or with `reset_teacher` a copy of the student, and likewise where the checkpoint's
    did not follow its student. One that is another encoder is left alone. So is the state of targets, which begins anew
    with `reset_teacher` and where the checkpoint has none. Raises CheckpointError, before anything is changed, when the
    checkpoint is of another model.
    """
    followed = checkpoint.extra.get("recipe", {}).get("teacher", {}).get("kind", "ema") == "ema"
    reset_teacher = reset_teacher or not followed
    own = teacher.kind == "checkpoint"
    has_state = bool(checkpoint.names("state")) and not reset_teacher and not own
    checked = None if reset_teacher or not teacher.follows else teacher
    _check(checkpoint, student, checked, (), with_state=has_state and checked is not None)
    if has_state and checked is None:
        checkpoint.check_names("state", target_state.shapes(teacher))
    _read_student(checkpoint, student, ())
    student.finish_loading(0)
    if own:
        teacher.finish_loading(0)
    elif reset_teacher:
        teacher.copy_student()
    else:
        _read_teacher(checkpoint, teacher)
        if has_state:
            _read_state(checkpoint, teacher)
        teacher.finish_loading(0)


def _read_student(checkpoint: Checkpoint, student: StudentEngine, moments: tuple[str, ...]) -> None:
    student.begin_loading()
    for shard in student.shards():
        shard.weight.copy_(checkpoint.read("student", shard.name, shard.slice, shard.start, shard.numel))
        for key in student.moments_of(shard.master):
            moment = shard.moment(student.optimizer, key)
            assert moment is not None
            if key in moments:
                moment.copy_(checkpoint.read(key, shard.name, shard.slice, shard.start, shard.numel))
            else:
                moment.zero_()


def _read_teacher(checkpoint: Checkpoint, teacher: EmaTeacher) -> None:
    averaged = set(checkpoint.names("teacher"))
    for held in teacher.shards():
        # A frozen one has what the teacher before it shared with its student, too.
        kind = "teacher" if held.name in averaged else "student"
        held.values.copy_(checkpoint.read(kind, held.name, held.slice, held.start, held.numel))


def _read_state(checkpoint: Checkpoint, teacher: EmaTeacher) -> None:
    for name, values in target_state.named(teacher).items():
        values.copy_(checkpoint.tensor("state", name))


def _check(
    checkpoint: Checkpoint,
    student: StudentEngine,
    teacher: EmaTeacher | None,
    moments: tuple[str, ...],
    *,
    with_state: bool = True,
) -> None:
    expected = student.global_shapes()
    for kind in ("student", *moments):
        wanted = expected
        if kind == MOMENTS[1] and student.matrices is not None:
            # Of what Muon steps, here or on other ranks, older checkpoints alone have a second moment: zeros.
            kept = {shard.name for shard in student.shards() if kind in student.moments_of(shard.master)}
            there = kept.union(checkpoint.names(kind))
            wanted = {name: shape for name, shape in expected.items() if name in there}
        checkpoint.check_names(kind, wanted)
    if teacher is not None:
        checkpoint.check_names("teacher", teacher.global_shapes())
    if with_state:
        checkpoint.check_names("state", {} if teacher is None else target_state.shapes(teacher))


def _writes(cut: TensorSlice | None, tensor_rank: int) -> bool:
    """Tensors that every tensor-parallel rank has whole are written by the first."""
    return cut is not None or tensor_rank == 0
