"""Tables that say which of our tensors is which of another program's, and conversion along them in both directions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from d2v_scale.errors import CheckpointError

Join = Callable[[list[Tensor]], Tensor]
Split = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Entry:
    """One of our tensors and the foreign tensors that hold the same numbers."""

    ours: str
    theirs: tuple[str, ...]
    join: Join = lambda tensors: tensors[0]
    """Foreign tensors to ours."""
    split: Split = lambda tensor: [tensor]
    """Ours to the foreign tensors; the inverse of `join`."""
    optional: bool = False
    """The other program need not have it (a mask embedding of a model that was exported for fine-tuning)."""


@dataclass
class KeyMap:
    """All entries of one model in one foreign naming."""

    entries: list[Entry] = field(default_factory=list)
    derived: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Foreign tensors that follow from the configuration: written on export, compared on import."""
    ignored: tuple[str, ...] = ()
    """Prefixes of foreign keys that belong to no pretraining model (task heads); named in the report."""
    buffers: tuple[str, ...] = ()
    """Last parts of foreign keys that are constants of the other program's classes; ignored whatever they hold."""
    initialised: tuple[str, ...] = ()
    """Prefixes of our names that the other program never has (the predictor in Hugging Face's classes)."""

    def add(self, ours: str, theirs: str, *, optional: bool = False) -> None:
        """The same tensor under another name."""
        self.entries.append(Entry(ours, (theirs,), optional=optional))

    def layer(self, ours: str, theirs: str) -> None:
        """A layer's weight and bias."""
        self.add(f"{ours}.weight", f"{theirs}.weight")
        self.add(f"{ours}.bias", f"{theirs}.bias")

    def reshaped(self, ours: str, theirs: str, our_shape: tuple[int, ...], their_shape: tuple[int, ...]) -> None:
        """The same numbers in another shape."""
        self.entries.append(
            Entry(ours, (theirs,), lambda t: t[0].reshape(our_shape), lambda tensor: [tensor.reshape(their_shape)])
        )

    def fused_qkv(self, ours: str, theirs: str, heads: int) -> None:
        """Rows ordered [q|k|v][head][head_dim] there, [head][q|k|v][head_dim] here."""
        self.entries.append(
            Entry(ours, (theirs,), lambda t: _swap_rows(t[0], 3, heads), lambda tensor: [_swap_rows(tensor, heads, 3)])
        )

    def separate_qkv(self, ours: str, theirs: tuple[str, str, str], heads: int) -> None:
        """Three tensors there, one with rows ordered [head][q|k|v][head_dim] here."""
        self.entries.append(
            Entry(
                ours,
                theirs,
                lambda t: _swap_rows(torch.cat(t), 3, heads),
                lambda tensor: [part.contiguous() for part in _swap_rows(tensor, heads, 3).chunk(3)],
            )
        )

    def make_optional(self, prefix: str) -> None:
        """The other program need not have what we have under this prefix."""
        self.entries = [replace(e, optional=True) if e.ours.startswith(prefix) else e for e in self.entries]

    def require_all(self, names: Iterable[str], what: str, remedy: str) -> None:
        """Raises CheckpointError for names of ours that are not in the table: they would be lost."""
        known = {entry.ours for entry in self.entries}
        lost = [name for name in names if name not in known]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise CheckpointError(f"{what} has no name for {', '.join(lost[:3])}{more}.", remedy)

    def theirs_to_ours_names(self) -> dict[str, str]:
        """Foreign key to our name; several may lead to one."""
        return {key: entry.ours for entry in self.entries for key in entry.theirs}


def _swap_rows(tensor: Tensor, first: int, second: int) -> Tensor:
    """Rows ordered [first][second][rest] to [second][first][rest]."""
    rest = tensor.shape[0] // (first * second)
    return tensor.view(first, second, rest, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


@dataclass
class KeyReport:
    """What became of every key of a conversion."""

    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Keys whose shape or derived content does not fit, with the reason."""
    ignored: list[str] = field(default_factory=list)

    def line(self) -> str:
        """One line of counts."""
        text = f"matched {len(self.matched)}, missing {len(self.missing)}, unexpected {len(self.unexpected)}"
        if self.wrong:
            text += f", not fitting {len(self.wrong)}"
        return text + (f", ignored {len(self.ignored)} ({', '.join(self.ignored[:3])} ...)" if self.ignored else "")

    def require_complete(self, what: str) -> None:
        """Raises `CheckpointError` listing every key that is missing, unexpected or does not fit."""
        faults = [("missing", self.missing), ("unexpected", self.unexpected), ("not fitting", self.wrong)]
        lines = [f"  {kind}: {key}" for kind, keys in faults for key in keys]
        if lines:
            raise CheckpointError(
                f"{what}: {self.line()}.\n" + "\n".join(lines) + "\n",
                "Give the file of the architecture it was trained with, unmodified; nothing was written.",
            )


def import_tensors(
    keymap: KeyMap, foreign: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[dict[str, Tensor], KeyReport]:
    """Foreign tensors under our names, and the report. `shapes`: the names wanted and what they must be (a teacher has
    fewer than the map). Nothing is raised here."""
    report = KeyReport()
    ours: dict[str, Tensor] = {}
    seen: set[str] = set()
    for entry in keymap.entries:
        if shapes is not None and entry.ours not in shapes:
            continue
        present = [key for key in entry.theirs if key in foreign]
        seen.update(present)
        if len(present) < len(entry.theirs):
            if not (entry.optional and not present):
                report.missing.extend(key for key in entry.theirs if key not in foreign)
            continue
        try:
            tensor = entry.join([foreign[key] for key in entry.theirs])
        except RuntimeError as error:
            report.wrong.append(f"{', '.join(entry.theirs)} ({error})")
            continue
        unfit = next((text for key in entry.theirs if (text := _unfit(foreign[key]))), None)
        if unfit is not None:
            report.wrong.append(f"{', '.join(entry.theirs)} ({unfit})")
            continue
        expected = None if shapes is None else shapes.get(entry.ours)
        if expected is not None and tuple(tensor.shape) != tuple(expected):
            theirs = ", ".join(f"{key} {tuple(foreign[key].shape)}" for key in entry.theirs)
            report.wrong.append(f"{theirs}: {entry.ours} is {tuple(expected)}")
            continue
        ours[entry.ours] = tensor
        report.matched.extend(entry.theirs)
    for key, make in keymap.derived.items():
        if key in foreign:
            seen.add(key)
            expected_tensor, found = make(), foreign[key]
            if expected_tensor.shape != found.shape or not torch.allclose(
                expected_tensor.double(), found.double(), atol=1e-5
            ):
                report.wrong.append(f"{key} (not what this architecture computes)")
            else:
                report.matched.append(key)
    for key in foreign:
        if key not in seen:
            known = key.startswith(keymap.ignored) or key.rpartition(".")[2] in keymap.buffers
            (report.ignored if known else report.unexpected).append(key)
    return ours, report


def _unfit(tensor: Tensor) -> str | None:
    """Why these cannot be weights: quantised ones have the right shape, too."""
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        return f"{str(tensor.dtype).removeprefix('torch.')}, not floating-point weights of 16 or 32 bits"
    return None if bool(torch.isfinite(tensor).all()) else "not finite"


def export_tensors(
    keymap: KeyMap, ours: Mapping[str, Tensor] | Callable[[str], Tensor | None], only: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors under foreign names, one at a time. `ours` may be a function that reads one; None: not there.

    `only`: the foreign names wanted; derived tensors are given where nothing else is.
    """
    read = ours if callable(ours) else ours.get
    wanted = None if only is None else set(only)
    for entry in keymap.entries:
        if wanted is not None and not wanted.intersection(entry.theirs):
            continue
        tensor = read(entry.ours)
        if tensor is not None:
            yield from zip(entry.theirs, entry.split(tensor), strict=True)
    for key, make in keymap.derived.items():
        if wanted is None or key in wanted:
            yield key, make()
