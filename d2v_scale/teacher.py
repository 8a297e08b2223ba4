"""The EMA teacher: sharded over the data-parallel ranks, in fp32, on the device or in host memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from d2v_scale.parallel.groups import Topology
from d2v_scale.parallel.zero import StudentEngine


@dataclass(kw_only=True)
class TeacherConfig:
    """Where the teacher lives and what it computes in."""

    placement: Literal["device", "cpu"] = "device"
    """Where its fp32 values are: with the compute device, or in host memory."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of its forward pass. `auto`: the student's."""


class ShardedTeacher:
    """Values of the teacher, its forward pass and its update. `role(name)`: averaged, copied or absent."""

    def __init__(
        self,
        make: Callable[[], nn.Module],
        student: StudentEngine,
        config: TeacherConfig,
        ds_config: dict[str, Any],
        topology: Topology,
        role: Callable[[str], str],
    ) -> None:
        self.completed_updates = 0
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The targets. Collective: every rank must call, under any grad mode."""
        raise NotImplementedError

    def features(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states for evaluation (the module's `features`). Collective."""
        raise NotImplementedError

    def update(self, decay: float, measure: bool = False) -> None:
        """Move towards the student by 1 - decay. Local: no collective. Call once after each applied optimizer step.

        `measure` also sums what `health` reports; pass True on the steps that are logged.
        """
        raise NotImplementedError

    def health(self) -> dict[str, Tensor]:
        """distance to the student, norm of the last measured update, norm of the teacher. Collective; no host sync."""
        raise NotImplementedError
