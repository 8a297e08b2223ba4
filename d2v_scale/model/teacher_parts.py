"""Which parameters a teacher has, and how."""

from dataclasses import dataclass, field
from typing import Literal

ParameterRole = Literal["averaged", "copied", "absent"]


@dataclass(kw_only=True)
class TeacherParts:
    """Which parameters the teacher has, and how each follows the student (spec 1.4).

    Names are prefixes of parameter names, cut at a dot: `stems.speech.features` covers everything below it.
    """

    shared: list[str] = field(default_factory=list)
    """Not the teacher's: it is given what the student computed with them."""
    copied: list[str] = field(default_factory=list)
    """Set to the student's values at every update instead of averaged."""
    with_predictor: bool = False
    """The teacher has the final norm and the predictor too, although targets do not need them (1.0 vision)."""

    def role(self, name: str) -> ParameterRole:
        """What becomes of the student's parameter `name` in the teacher."""
        if _under(name, self.shared):
            return "absent"
        if name.startswith("stems.") and ".hidden." in f"{name}.":
            return "absent"  # nothing is hidden from a teacher
        if not self.with_predictor and _under(name, ["predictors", "final_norm"]):
            return "absent"
        return "copied" if _under(name, self.copied) else "averaged"


def _under(name: str, prefixes: list[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
