"""Reading: resharding, damage, other models, other versions."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import run_ranks

from d2v_scale.checkpoint import Checkpoint, find_newest_valid, open_any, write_single
from d2v_scale.checkpoint.config import CheckpointConfig
from d2v_scale.checkpoint.format import FORMAT, MANIFEST, Piece
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.errors import CheckpointError
from d2v_scale.parallel.shards import TensorSlice
from d2v_scale.run_files.committed import MARKER


def cut(tensor: torch.Tensor, piece: TensorSlice | None) -> torch.Tensor:
    return tensor if piece is None else tensor.chunk(piece.count, dim=piece.dim)[piece.index]


def save_cut(root: Path, tensor: torch.Tensor, dim: int | None, slices: int, ranks: int) -> Checkpoint:
    """Every slice divided over `ranks` writers, as ZeRO-3 does: equal rank-contiguous ranges, the last ones short."""
    writers = []
    for index in range(slices):
        place = None if dim is None else TensorSlice(dim, index, slices)
        flat = cut(tensor, place).reshape(-1)
        size = -(-flat.numel() // ranks)
        for rank in range(ranks):
            start = min(rank * size, flat.numel())
            values = flat[start : start + size]
            shape = tuple(cut(tensor, place).shape)
            writers.append([Piece("teacher", "w", shape, place, start, values)] if values.numel() else [])
    world_size = len(writers)
    root.mkdir(parents=True)
    all_writers = [
        CheckpointWriter(root, rank, world_size, "s", CheckpointConfig(peer_timeout=20)) for rank in range(world_size)
    ]
    for rank in reversed(range(world_size)):
        all_writers[rank].save(1, writers[rank], {}, {})
    for writer in all_writers:
        writer._join()
    assert all_writers[0].poll()[0].error is None
    return Checkpoint.open(root / "step-00000001")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_layout_reads_as_any_other(tmp_path_factory, data) -> None:
    rows = data.draw(st.sampled_from([1, 4, 8, 12]), label="rows")
    columns = data.draw(st.sampled_from([1, 3, 4, 8]), label="columns")
    tensor = torch.randn(rows, columns)

    def layout(label: str) -> tuple[int | None, int]:
        options = [(None, 1)]
        options += [(dim, n) for dim, size in ((0, rows), (1, columns)) for n in (2, 4) if size % n == 0]
        return data.draw(st.sampled_from(options), label=label)

    dim, slices = layout("saved as")
    ranks = data.draw(st.integers(1, 3), label="ranks")
    saved = save_cut(tmp_path_factory.mktemp("c") / "root", tensor, dim, slices, ranks)
    assert torch.equal(saved.tensor("teacher", "w"), tensor)
    dim, slices = layout("read as")
    for index in range(slices):
        place = None if dim is None else TensorSlice(dim, index, slices)
        flat = cut(tensor, place).reshape(-1)
        start = data.draw(st.integers(0, flat.numel() - 1), label="start")
        numel = data.draw(st.integers(1, flat.numel() - start), label="numel")
        assert torch.equal(saved.read("teacher", "w", place, start, numel), flat[start : start + numel])


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2."""
    for step in (1, 2):
        write_single(tmp_path, {"a": torch.full((3, 4), float(step))}, {"a": torch.ones(3, 4)}, {"n": step}, step)
    return tmp_path


def test_single_process_round_trip(tmp_path: Path) -> None:
    odd = torch.randn(4, 3).t()
    path = write_single(tmp_path, {"odd": odd, "scalar": torch.tensor(2.5)}, {"odd": odd.bfloat16()}, {"k": [1]}, 9)
    found = open_any(tmp_path)
    assert found.path == path
    assert (found.step, found.extra, found.kinds()) == (9, {"k": [1]}, ["student", "teacher"])
    assert found.names("student") == ["odd", "scalar"]
    assert found.names("exp_avg") == []
    assert found.shape("student", "odd") == (3, 4)
    assert torch.equal(found.tensor("student", "odd"), odd)
    assert torch.equal(found.tensor("student", "scalar"), torch.tensor(2.5))
    assert torch.equal(found.tensor("teacher", "odd"), odd.bfloat16().float())


def test_many_files_when_weights_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_scale.checkpoint.single.FILE_BYTES", 64)
    tensors = {f"t{i}": torch.randn(5, 3) for i in range(7)}
    found = Checkpoint.open(write_single(tmp_path, tensors))
    assert len(found.manifest.files) > 3
    assert all(torch.equal(found.tensor("student", name), tensors[name]) for name in tensors)


def data_file(path: Path, step: int) -> Path:
    return path / f"step-{step:08d}" / "rank-00000.safetensors"


def truncate(path: Path) -> None:
    with data_file(path, 2).open("r+b") as file:
        file.truncate(file.seek(0, 2) - 5)


def flip(path: Path) -> None:
    content = bytearray(data_file(path, 2).read_bytes())
    content[-3] ^= 1
    data_file(path, 2).write_bytes(content)


def drop_file(path: Path) -> None:
    data_file(path, 2).unlink()


def drop_marker(path: Path) -> None:
    (path / "step-00000002" / MARKER).unlink()


def spoil_manifest(path: Path) -> None:
    manifest = path / "step-00000002" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"step":2', '"step":3'))


def empty_manifest(path: Path) -> None:
    (path / "step-00000002" / MANIFEST).write_text("")


def empty_marker(path: Path) -> None:
    (path / "step-00000002" / MARKER).write_text("")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "bytes instead of"),
        (flip, "checksum"),
        (drop_file, "cannot be read"),
        (drop_marker, "never completed"),
        (spoil_manifest, "checksum"),
        (empty_manifest, "damaged"),
        (empty_marker, "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(two: Path, damage, reason: str, caplog) -> None:
    damage(two)
    found, skipped = find_newest_valid(two)
    assert found is not None
    assert found.step == 1
    assert [s.path.name for s in skipped] == ["step-00000002"]
    assert reason in skipped[0].reason
    assert "step-00000002" in caplog.text
    with pytest.raises(CheckpointError):
        open_any(two / "step-00000002")


def test_all_ranks_go_on_from_the_same_checkpoint_though_one_sees_the_newest_late(two: Path) -> None:
    run_ranks(2, Path(__file__).with_name("listing_worker.py"), str(two))
    assert [(two / f"found-{rank}").read_text() for rank in (0, 1)] == ["1 ['step-00000002']"] * 2


def test_nothing_valid_is_an_error_and_nothing_at_all_is_not(two: Path, tmp_path: Path) -> None:
    assert find_newest_valid(tmp_path / "nowhere") == (None, [])
    for step in (1, 2):
        data_file(two, step).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        find_newest_valid(two)


def rewrite(path: Path, change) -> None:
    """Change the manifest and commit it again."""
    body = json.loads((path / MANIFEST).read_text())
    change(body)
    text = json.dumps(body)
    (path / MANIFEST).write_text(text)
    (path / MARKER).write_text(json.dumps({"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}))


def test_a_newer_format_is_refused_not_skipped(two: Path) -> None:
    rewrite(two / "step-00000002", lambda body: body.update(format=FORMAT + 1, written_by="9.9"))
    with pytest.raises(CheckpointError, match=r"written by d2v_scale 9\.9.*Upgrade"):
        find_newest_valid(two)


def test_missing_pieces_are_named(two: Path) -> None:
    rewrite(two / "step-00000002", lambda body: body["tensors"]["teacher"]["a"][3].clear())
    with pytest.raises(CheckpointError, match="teacher a"):
        Checkpoint.open(two / "step-00000002")


def test_double_pieces_are_named(two: Path) -> None:
    rewrite(two / "step-00000002", lambda body: body["tensors"]["student"]["a"][3].append([0, 0, 3, 2]))
    with pytest.raises(CheckpointError, match="student a"):
        Checkpoint.open(two / "step-00000002")


def test_another_model_is_refused_with_every_difference(two: Path) -> None:
    found = open_any(two)
    found.check_names("student", {"a": (3, 4)})
    with pytest.raises(CheckpointError, match=r"missing: b; other shape: a is \(3, 4\), not \(4, 3\)"):
        found.check_names("student", {"a": (4, 3), "b": (1,)})
    with pytest.raises(CheckpointError, match="unexpected: a"):
        found.check_names("teacher", {})


def test_unknown_tensors_and_paths_are_named(two: Path) -> None:
    with pytest.raises(CheckpointError, match="student tensor 'nope'"):
        open_any(two).tensor("student", "nope")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_any(two / "nope")
    (two / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_any(two / "empty")
