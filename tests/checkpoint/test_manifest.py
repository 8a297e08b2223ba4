"""Manifests of many ranks: the same ranges as every rank wrote, in few calls, and those of format 1 as before."""

import hashlib
import json
import shutil
from pathlib import Path

import manifest_scale
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_scale.checkpoint import Checkpoint
from d2v_scale.checkpoint.commit import commit, write_tensors
from d2v_scale.checkpoint.format import (
    FORMAT,
    MANIFEST,
    FileEntry,
    Manifest,
    Piece,
    _ranges,
    _runs,
    check_coverage,
    describe,
    first_only,
    merge,
)
from d2v_scale.errors import CheckpointError
from d2v_scale.parallel.shards import TensorSlice
from d2v_scale.run_files.committed import MARKER

SHAPES: manifest_scale.Shapes = {
    "student": {f"blocks.{k}.{name}": shape for k in range(12) for name, shape in (("w", (96, 384)), ("b", (96,)))},
    "teacher": {f"blocks.{k}.w": (96, 384) for k in range(12)},
}

any_ranges = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 40), st.integers(0, 9)), max_size=30
)


@settings(max_examples=300, deadline=None)
@given(any_ranges)
def test_runs_are_the_ranges_whatever_those_are(rows: list[tuple[int, int, int, int]]) -> None:
    ordered = np.array(sorted(rows, key=lambda row: (row[1], row[2], row[3], row[0])), dtype=np.int64).reshape(-1, 4)
    runs = _runs(ordered)
    assert len(runs) <= len(rows)
    again = _ranges(json.loads(json.dumps(runs)), FORMAT, max(10, len(rows)))
    assert sorted(map(tuple, again.tolist())) == sorted(rows)


@settings(max_examples=100, deadline=None)
@given(
    world=st.integers(1, 9),
    tensor=st.integers(1, 3),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    moments=st.booleans(),
)
def test_every_cut_is_found_again(world: int, tensor: int, sizes: list[int], moments: bool) -> None:
    """Ranks are tensor-major: those of one slice are `tensor` files apart."""
    layouts = []
    for rank in range(world * tensor):
        cut = TensorSlice(0, rank % tensor, tensor) if tensor > 1 else None
        pieces = []
        for number, size in enumerate(sizes):
            start, numel = manifest_scale.ranges_of(size, rank // tensor, world)
            if numel:
                pieces.append(Piece("student", f"p{number}", (size,), cut, start, torch.zeros(numel)))
        layouts.append(describe(pieces))
    tensors = merge(layouts, moments)
    files = [FileEntry(str(rank), 1, "a") for rank in range(world * tensor)]
    again = Manifest.from_json(Manifest(1, files, tensors, {}, {}).to_json(), Path("m"))
    assert set(again.tensors) == ({"student", "exp_avg", "exp_avg_sq"} if moments else {"student"})
    check_coverage(again.tensors)
    for number, size in enumerate(sizes):
        entry = again.tensors["student"][f"p{number}"]
        assert entry.shape == (size * tensor,)
        for index in range(tensor):
            owners = np.full(size, -1)
            for file, piece_slice, start, numel in entry.overlapping(index, 0, size):
                assert (piece_slice, file % tensor) == (index, index)
                assert (owners[start : start + numel] == -1).all()
                owners[start : start + numel] = file // tensor
            chunk = -(-size // world)
            np.testing.assert_array_equal(owners, np.arange(size) // chunk)
            middle = size // 2
            [found] = entry.overlapping(index, middle, middle + 1)
            assert found[2] <= middle < found[2] + found[3]


def test_a_tensor_may_have_a_first_moment_alone() -> None:
    kinds = {"a": ("student", "exp_avg", "exp_avg_sq"), "b": ("student", "exp_avg")}
    pieces = [Piece(kind, name, (4,), None, 0, torch.zeros(4)) for name in kinds for kind in kinds[name]]
    assert first_only(pieces) == {"b"}
    tensors = merge([describe(pieces)], moments=True, first_only={"b"})
    text = Manifest(1, [FileEntry("0", 1, "a")], tensors, {}, {}).to_json()
    again = Manifest.from_json(text, Path("m")).tensors
    assert {name: tuple(kind for kind in again if name in again[kind]) for name in kinds} == kinds
    with pytest.raises(CheckpointError, match="damaged"):
        Manifest.from_json(text.replace('"moments":["a"]', '"moments":["c"]'), Path("m"))


def test_writers_that_disagree_are_refused() -> None:
    layouts = [describe([Piece("student", "a", shape, None, 0, torch.zeros(6))]) for shape in ((6,), (2, 3))]
    with pytest.raises(CheckpointError, match="disagree about student a"):
        merge(layouts, moments=False)


@pytest.mark.parametrize(
    "rows",
    [[[0, 0, 0, 4, 10**12, 1]], [[0, 0, 0, 4, 3, 5]], [[-1, 0, 0, 12]], [[0, 0, 0, 4, -3, 1]], [[0, 0]], [["x"]]],
)
def test_a_manifest_with_impossible_runs_is_damaged(rows: list[list[int]]) -> None:
    tensors = merge([describe([Piece("student", "a", (12,), None, 0, torch.zeros(12))])], moments=False)
    body = json.loads(Manifest(1, [FileEntry("f", 1, "a")], tensors, {}, {}).to_json())
    body["tensors"]["student"]["a"][3] = rows
    with pytest.raises(CheckpointError, match="is damaged"):
        Manifest.from_json(json.dumps(body), Path("m"))


def test_a_checkpoint_of_format_1_reads_the_same(tmp_path: Path) -> None:
    values = torch.arange(37, dtype=torch.float32)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    files, layouts = [], []
    for rank in range(5):
        start, numel = manifest_scale.ranges_of(37, rank, 5)
        own = values[start : start + numel].clone()
        names = ("student", "exp_avg", "exp_avg_sq", "teacher")
        files.append(
            write_tensors(temporary / f"rank-{rank:05d}.safetensors", {f"{k}/a": own + i for i, k in enumerate(names)})
        )
        layouts.append(describe([Piece(kind, "a", (37,), None, start, own) for kind in names]))
    new = commit(temporary, tmp_path, Manifest(3, files, merge(layouts, moments=True), {"completed_updates": 3}, {}))
    old = tmp_path / "step-00000004"
    shutil.copytree(new, old)
    body = json.loads((old / MANIFEST).read_text())
    assert body["format"] == 2
    # As format 1 wrote it: every range, in the order of the files.
    ranges = [[rank, 0, *manifest_scale.ranges_of(37, rank, 5)] for rank in range(5)]
    for kind in ("student", "teacher"):
        assert body["tensors"][kind]["a"] == [[37], None, 1, [[0, 0, 0, 8, 4, 1], [4, 0, 32, 5]]]
        body["tensors"][kind]["a"][3] = ranges
    body["format"] = 1
    text = json.dumps(body)
    (old / MANIFEST).write_text(text)
    (old / MARKER).write_text(json.dumps({"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}))
    ours, theirs = Checkpoint.open(new), Checkpoint.open(old)
    assert theirs.manifest.format == 1
    assert (ours.kinds(), ours.names("teacher"), ours.manifest.state) == (
        theirs.kinds(),
        theirs.names("teacher"),
        theirs.manifest.state,
    )
    for offset, kind in enumerate(names):
        assert torch.equal(ours.tensor(kind, "a"), values + offset)
        assert torch.equal(theirs.tensor(kind, "a"), values + offset)
        assert torch.equal(theirs.read(kind, "a", None, 7, 20), values[7:27] + offset)


def test_work_grows_by_less_than_a_call_for_every_range() -> None:
    """Format 1 made 8 calls a range on rank 0 and 6 in every reader."""
    made = {}
    for world in (32, 256):
        reports = [manifest_scale.report(SHAPES, rank, world) for rank in range(world)]
        text, writing = manifest_scale.calls(manifest_scale.written, reports)
        found, reading = manifest_scale.calls(manifest_scale.read, text, world // 2, world)
        assert found > 0
        made[world] = len(reports), writing, reading, len(text)
    ranges = sum(len(tensors) for tensors in SHAPES.values()) * (256 - 32)
    _, writing, reading, size = np.subtract(made[256], made[32])
    assert writing < ranges / 2
    assert reading < ranges / 20
    # The text grows by its list of files.
    assert size < (256 - 32) * 120
