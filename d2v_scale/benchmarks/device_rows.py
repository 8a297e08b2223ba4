"""The rows of `bench.py device`, ranked by what they decide.

`python -m d2v_scale.benchmarks.device_rows [--only ROWS]` prints them as a table; no device, no PyTorch. The seconds
are what a row is allowed for, not measured: no GPU has been at hand. The leading rows that fit into eight minutes are
marked.
"""

import argparse
import fnmatch
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from d2v_scale.errors import EXIT_BAD_INPUT, UserError

FIRST = "first"
FIRST_SECONDS = 8 * 60

_NARROW = ("model.backbone.width=64", "model.backbone.heads=4", "model.backbone.ffn=128", "model.backbone.depth=2")
_TARGET = ("objective.target.top_k_layers=2", "model.backbone.prenet_depth=0")

VARIANTS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "hf": (),
    "varying lengths": (),
    "padded": (),
    "compile": ("model.compile=true",),
    "recomputed": ("model.activation_checkpointing=true",),
    "recomputed, compile": ("model.activation_checkpointing=true", "model.compile=true"),
    "teacher on cpu": ("teacher.placement=cpu",),
    "streams": (),
    "gradients": (),
}


@dataclass(frozen=True)
class Model:
    """A row's model at full and at dry-run size."""

    name: str
    recipe: str
    samples: int
    length: int
    """Audio samples of a recording."""
    small: tuple[str, ...]
    """Recipe options of the dry run."""


MODELS = {
    "vision1": Model(
        "ViT-L 1.0",
        "d2v1_vision_large",
        128,
        0,
        ("model.vision.image_size=64", "objective.masking.target_count=8", "objective.masking.min_block=4"),
    ),
    "vision2": Model(
        "ViT-L 2.0", "d2v2_vision_large", 32, 0, ("model.vision.image_size=64", "model.predictor.width=64")
    ),
    "speech1": Model("speech-large 1.0", "d2v1_speech_large", 16, 240_000, ()),
    "speech2": Model("speech-large 2.0", "d2v2_speech_large", 8, 240_000, ("model.predictor.width=64",)),
}


@dataclass(frozen=True)
class Row:
    """One row: what it is called with `--only`, what is measured, and why."""

    name: str
    variant: str
    seconds: int
    """Allowed for it where the first eight minutes are counted."""
    decides: str

    @property
    def model(self) -> Model | None:
        """None: the row is of no model."""
        return MODELS.get(self.name.rpartition("-")[2])


def _ranked() -> tuple[Row, ...]:
    sound = "whether any other number counts: gradients right with the kernels chosen, and which cuDNN may have a mask"
    speed = "what a GPU-hour buys: MFU for tools/plan.py, memory and with it the micro-batch, wait for data"
    ratio = "whether the claim against a plain script holds"
    compiled = "whether model.compile becomes the recipe's default"
    memory = "what activation checkpointing costs where memory is short"
    stream = "whether the teacher gets a stream of its own beside the student (below 0.97)"
    host = "whether teacher.placement=cpu is free where memory is short"
    rows = [
        ("gradients", "gradients", 25, sound),
        ("ours-vision2", "ours", 35, speed),
        ("ours-speech2", "ours", 40, speed),
        ("varying-speech2", "varying lengths", 45, "whether lengths must be rounded: MFU against ours-speech2"),
        ("padded-speech1", "padded", 35, "what a mask costs attention: step against ours-speech1"),
        ("ours-speech1", "ours", 35, speed),
        ("hf-vision2", "hf", 35, ratio),
        ("hf-speech2", "hf", 40, ratio),
        ("compile-vision2", "compile", 80, compiled),
        ("ours-vision1", "ours", 35, speed),
        ("streams-speech2", "streams", 35, stream),
        ("streams-vision2", "streams", 35, stream),
        ("compile-speech2", "compile", 80, compiled),
        ("hf-vision1", "hf", 35, ratio),
        ("hf-speech1", "hf", 35, ratio),
        ("host-vision2", "teacher on cpu", 35, host),
        ("host-speech2", "teacher on cpu", 35, host),
        ("recomputed-vision2", "recomputed", 35, memory),
        ("recomputed-speech2", "recomputed", 40, memory),
        ("compile-vision1", "compile", 80, compiled),
        ("compile-speech1", "compile", 80, compiled),
        ("host-vision1", "teacher on cpu", 35, host),
        ("host-speech1", "teacher on cpu", 35, host),
        ("recomputed-vision1", "recomputed", 35, memory),
        ("recomputed-speech1", "recomputed", 35, memory),
        *(
            (f"recomputed-compile-{model}", "recomputed, compile", 80, f"{memory}, compiled")
            for model in ("vision2", "speech2", "vision1", "speech1")
        ),
    ]
    return tuple(Row(*row) for row in rows)


ROWS = _ranked()


def first_rows() -> list[str]:
    """Names of the leading rows that are allowed for in the first eight minutes."""
    names, seconds = [], 0
    for row in ROWS:
        seconds += row.seconds
        if seconds > FIRST_SECONDS:
            break
        names.append(row.name)
    return names


def select(only: str | None) -> list[Row]:
    """The rows that `only` names, in their rank; None: all. Names or patterns with commas between, or `first`.

    Raises UserError for a part that names none.
    """
    if only is None:
        return list(ROWS)
    wanted: set[str] = set()
    for part in filter(None, (one.strip() for one in only.split(","))):
        found = first_rows() if part == FIRST else fnmatch.filter([row.name for row in ROWS], part)
        if not found:
            names = ", ".join(row.name for row in ROWS)
            raise UserError(f"--only: {part!r} is no row", f"The rows are {names}; patterns and `first` go too.")
        wanted.update(found)
    if not wanted:
        raise UserError("--only names no row", "Leave it out for all.")
    return [row for row in ROWS if row.name in wanted]


@dataclass(kw_only=True)
class Spec:
    """What one process measures."""

    model: str
    """What the table calls it."""
    variant: str
    recipe: str
    options: tuple[str, ...]
    """Recipe options."""
    kind: Literal["steps", "gradients", "streams"] = "steps"
    peer: bool = False
    """Measure the Hugging Face peer under bf16 autocast instead of this project."""
    samples: int
    """Of a step; halved until it fits the device."""
    length: int
    """Audio samples of each recording."""
    lengths: Literal["equal", "varying", "padded"] = "equal"
    """`varying`: batches of many lengths and as many seconds each. `padded`: recordings of 60 to 100 % of a batch."""
    warmup: int
    steps: int
    """Steps of a block; three blocks are timed, and the median counts."""
    details: str | None = None
    """Folder for a trace and the table of the costliest operations; also measures the wait for data."""
    workers: int = 0
    """Processes that decode, for the wait for data."""


def specs(out: Path, dry_run: bool, only: str | None = None) -> list[Spec]:
    """What to measure, in rank. A dry run of all rows leaves out what it has done with another model."""
    found = []
    for row in select(only):
        model = row.model
        if dry_run and only is None and row.variant not in ("ours", "hf") and _repeats(row):
            continue
        spec = Spec(
            model="attention" if model is None else model.name,
            variant=row.variant,
            recipe="" if model is None else model.recipe,
            options=tuple(f"--{option}" for option in VARIANTS[row.variant]),
            peer=row.variant == "hf",
            samples=0 if model is None else model.samples,
            length=0 if model is None else model.length,
            warmup=4,
            steps=6,
            details=str(out / row.name) if row.variant == "ours" else None,
            workers=max(2, min(12, (os.cpu_count() or 2) - 2)),
        )
        match row.variant:
            case "gradients" | "streams" as kind:
                spec.kind = kind
            case "varying lengths":
                spec.lengths = "varying"
            case "padded":
                spec.lengths = "padded"
        found.append(_small(spec, model) if dry_run and model is not None else spec)
    return found


def _repeats(row: Row) -> bool:
    return any(other.variant == row.variant for other in ROWS[: ROWS.index(row)])


def _small(spec: Spec, model: Model) -> Spec:
    options = tuple(f"--{option}" for option in (*_NARROW, *_TARGET, *model.small))
    length = 8000 if model.length else 0
    return replace(spec, options=(*spec.options, *options), samples=2, length=length, warmup=1, steps=1, workers=1)


def table(rows: list[Row]) -> str:
    """Markdown: rank, name, the mark of the first eight minutes, what the row decides."""
    first = set(first_rows())
    lines = ["| rank | row | first 8 minutes | seconds allowed | decides |", "|---|---|---|---|---|"]
    for row in rows:
        mark = "yes" if row.name in first else ""
        lines.append(f"| {ROWS.index(row) + 1} | {row.name} | {mark} | {row.seconds} | {row.decides} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="ROWS")
    try:
        print(table(select(parser.parse_args(arguments).only)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
