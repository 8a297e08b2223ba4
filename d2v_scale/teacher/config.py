"""Where the teacher lives and what it computes in."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(kw_only=True)
class TeacherConfig:
    """Where the teacher lives and what it computes in."""

    placement: Literal["device", "cpu"] = "device"
    """Where its fp32 values are: with the compute device, or in host memory."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of its forward pass. `auto`: the student's."""

    def precision(self, student_config: dict[str, Any]) -> Literal["fp32", "bf16"]:
        """The precision of the forward pass beside a student with this DeepSpeed configuration."""
        student: Literal["fp32", "bf16"] = "bf16" if student_config["bf16"]["enabled"] else "fp32"
        return student if self.dtype == "auto" else self.dtype
