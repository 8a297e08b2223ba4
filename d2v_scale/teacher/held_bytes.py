"""What this rank really holds, in bytes of tensor storage, by class of tensor."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from d2v_scale.parallel.shards import MOMENTS
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.teacher.sharded import EmaTeacher

CLASSES = ("weights", "gradients", "master and moments", "teacher fp32", "teacher compute")


def held_bytes(student: StudentEngine, teacher: EmaTeacher) -> dict[str, int]:
    """Bytes per class. Local. Gradients are there between the last `backward` and `step`. In a
    pipeline: of this stage.

    A storage is counted once, for the first class that holds it: in fp32 the teacher's compute copy is its fp32 part,
    and at stages 1 and 2 in fp32 without offload the master is this rank's part of the weights.
    """
    seen: set[int] = set()

    def size(tensors: Iterable[Tensor]) -> int:
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                total += storage.nbytes()
        return total

    zero: Any = student.engine.optimizer
    parameters = list(student.module.parameters())
    masters = zero.fp32_partitioned_groups_flat if student.stage == 3 else zero.single_partition_of_fp32_groups
    moments = [student.optimizer.state[m][key] for m in masters for key in MOMENTS if key in student.optimizer.state[m]]
    teacher_parameters = list(teacher.module.parameters())
    shards = teacher.shards()
    sizes = {
        "weights": size([*parameters, *(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))]),
        "gradients": size(_gradients(student)),
        "master and moments": size([*masters, *moments]),
        "teacher fp32": size(shard.values for shard in shards),
        "teacher compute": size(t for p in teacher_parameters for t in (p, getattr(p, "ds_tensor", p))),
    }
    assert tuple(sizes) == CLASSES
    return sizes


def _gradients(student: StudentEngine) -> list[Tensor]:
    zero: Any = student.engine.optimizer
    held = (getattr(p, key, None) for p in student.module.parameters() for key in ("grad", "grad_accum"))
    found = [gradient for gradient in held if gradient is not None]
    if student.stage == 3:
        return [*found, zero.grad_partitions_flat_buffer]
    for group in zero.averaged_gradients.values():
        found += [t for t in (group or []) if isinstance(t, Tensor)]
    return found
