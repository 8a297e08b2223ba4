"""Who the teacher is, where it lives and what it computes in."""

from dataclasses import dataclass
from typing import Any, Literal

from d2v_scale.model.config import ModelConfig
from d2v_scale.model.teacher_parts import TeacherParts


@dataclass(kw_only=True)
class TeacherConfig:
    """Who the teacher is, where it lives and what it computes in."""

    kind: Literal["ema", "frozen", "checkpoint"] = "ema"
    """`ema`: it follows the student (`objective.ema`). `frozen`: it keeps the weights that the student begins with, or
    that --init_from has. `checkpoint`: the encoder of another run, of any width and depth, which keeps its weights."""
    checkpoint: str | None = None
    """Whose encoder, of `kind: checkpoint`: a run directory, a checkpoint or an exported folder. Once there is a
    checkpoint of the new run, it is not read any more, and cannot be changed."""
    model: ModelConfig | None = None
    """What that encoder is made of; null, and wherever it is at hand: as it says itself."""
    placement: Literal["device", "cpu"] = "device"
    """Where its fp32 values are: with the compute device, or in host memory."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of its forward pass. `auto`: the student's."""

    @property
    def follows(self) -> bool:
        """Whether its weights move with the student's."""
        return self.kind == "ema"

    def model_beside(self, student: ModelConfig) -> ModelConfig:
        """What the teacher of this student is made of."""
        return student if self.model is None else self.model

    def parts(self, of_student: TeacherParts) -> TeacherParts:
        """What the teacher has. What does not follow the student can share nothing that the student trains."""
        return of_student if self.follows else TeacherParts()

    def precision(self, student_config: dict[str, Any]) -> Literal["fp32", "bf16"]:
        """The precision of the forward pass beside a student with this DeepSpeed configuration."""
        student: Literal["fp32", "bf16"] = "bf16" if student_config["bf16"]["enabled"] else "fp32"
        return student if self.dtype == "auto" else self.dtype
