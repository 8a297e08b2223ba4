"""What a checkpoint's manifest costs at scale: `python tests/manifest_scale.py RECIPE WORLD ...`.

Ranges of every tensor over WORLD ranks as ZeRO-3 cuts them, without a model or a file: Python calls and CPU seconds of
rank 0's thread (reports to manifest) and of a reader (manifest to the ranges that one rank reads).
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from d2v_scale.checkpoint.format import FileEntry, Manifest, Piece, check_coverage, describe, merge

Shapes = dict[str, dict[str, tuple[int, ...]]]
"""kind -> name -> shape."""


def ranges_of(size: int, rank: int, world_size: int) -> tuple[int, int]:
    """Start and length of what ZeRO-3 gives a rank of a tensor."""
    chunk = -(-size // world_size)
    start = min(rank * chunk, size)
    return start, min(chunk, size - start)


class Values:
    """As much of a tensor as a layout asks for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def numel(self) -> int:
        return self._count


def report(shapes: Shapes, rank: int, world_size: int) -> str:
    """The text of a rank's report."""
    pieces = []
    for kind, tensors in shapes.items():
        for name, shape in tensors.items():
            start, numel = ranges_of(math.prod(shape), rank, world_size)
            if numel:
                pieces.append(Piece(kind, name, shape, None, start, Values(numel)))  # type: ignore[arg-type]
    return json.dumps(describe(pieces), separators=(",", ":"))


def written(reports: list[str]) -> str:
    """What rank 0's thread makes of all reports."""
    tensors = merge([json.loads(text) for text in reports], moments=True)
    files = [FileEntry(f"rank-{rank:05d}.safetensors", 10**9, "a" * 64) for rank in range(len(reports))]
    return Manifest(step=1, files=files, tensors=tensors, state={}, extra={}).to_json()


def read(text: str, rank: int, world_size: int) -> int:
    """What a reader does: opens the manifest and looks up what it reads of student, moments and teacher."""
    manifest = Manifest.from_json(text, Path("manifest.json"))
    check_coverage(manifest.tensors)
    found = 0
    for kind in ("student", "exp_avg", "exp_avg_sq", "teacher"):
        for entry in manifest.tensors[kind].values():
            start, numel = ranges_of(math.prod(entry.shape), rank, world_size)
            found += len(entry.overlapping(0, start, start + numel))
    return found


def calls(function: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """The result, and how many Python and C functions were called on the way."""
    count = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event in ("call", "c_call"):
            count += 1

    sys.setprofile(watch)
    try:
        result = function(*arguments)
    finally:
        sys.setprofile(None)
    return result, count


def timed(function: Callable[..., Any], *arguments: Any) -> float:
    begin = time.process_time()
    function(*arguments)
    return time.process_time() - begin


def main() -> None:
    import torch

    from d2v_scale import command_line
    from d2v_scale.networks.stack import Student, Teacher
    from d2v_scale.parallel import groups

    groups.single_process()
    recipe, _ = command_line.parse(["--recipe", sys.argv[1]])
    with torch.device("meta"):
        stacks = {
            "student": Student(recipe.model),
            "teacher": Teacher(recipe.model, recipe.objective.target, recipe.parts()),
        }
    shapes = {kind: {n: tuple(p.shape) for n, p in stack.named_parameters()} for kind, stack in stacks.items()}
    for world in map(int, sys.argv[2:]):
        reports = [report(shapes, rank, world) for rank in range(world)]
        text, writing = calls(written, reports)
        _, reading = calls(read, text, world // 2, world)
        ranges = np.sum([len(json.loads(one)["starts"]) for one in reports])
        print(
            f"world {world}: {ranges} ranges, reports {sum(map(len, reports)) / 1e6:.1f} MB, manifest "
            f"{len(text) / 1e6:.2f} MB; rank 0: {writing} calls, {timed(written, reports):.2f} s; reader: {reading} "
            f"calls, {timed(read, text, world // 2, world):.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
