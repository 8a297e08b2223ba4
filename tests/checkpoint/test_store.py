"""The commit protocol, with real processes that share nothing but the file system."""

import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from d2v_scale.checkpoint import Checkpoint, find_newest_valid
from d2v_scale.checkpoint.commit import sweep
from d2v_scale.checkpoint.config import CheckpointConfig
from d2v_scale.checkpoint.format import Piece
from d2v_scale.checkpoint.writer import CheckpointWriter
from d2v_scale.process import faults
from d2v_scale.run_files.committed import committed_steps, directory_name
from d2v_scale.shards.forking import forking

fork = multiprocessing.get_context("fork")
SIZE = 37


def weights(step: int) -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.float32) + 1000.0 * step


def pieces(step: int, rank: int) -> list[Piece]:
    """Rank 0 has the first 20 elements, rank 1 the rest; kinds differ by an offset."""
    start, stop = (0, 20) if rank == 0 else (20, SIZE)
    kinds = {"student": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5, "teacher": 0.75}
    return [
        Piece(kind, "block.weight", (SIZE,), None, start, weights(step)[start:stop] + offset)
        for kind, offset in kinds.items()
    ]


def save_steps(root: Path, rank: int, session: str, steps: list[int], fault: str, limit: int | None) -> None:
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    faults.arm(fault)
    if limit is not None and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    config = CheckpointConfig(keep_last=2, keep_every=4, peer_timeout=20)
    writer = CheckpointWriter(root, rank, 2, session, config)
    for step in steps:
        if limit is not None and rank == 1 and step == steps[-1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        writer.save(step, pieces(step, rank), {"completed_updates": step}, {"step": step})
        # Ranks stay together as in training, where a step needs all of them.
        writer._join()
        (root / f"rank{rank}-step{step}-{session}").touch()
        while not (root / f"rank{1 - rank}-step{step}-{session}").exists():
            time.sleep(0.005)


def run_two(root: Path, steps: list[int], fault: str = "", limit: int | None = None) -> list[int]:
    """Two writers; when one dies the other is killed, as the launcher does. Their exit codes."""
    root.mkdir(parents=True, exist_ok=True)
    sweep(root)
    session = f"s{time.monotonic_ns()}"
    ranks = [fork.Process(target=save_steps, args=(root, rank, session, steps, fault, limit)) for rank in (0, 1)]
    with forking():
        for process in ranks:
            process.start()
    deadline = time.monotonic() + 30
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in ranks):
            break
        time.sleep(0.01)
    for process in ranks:
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert time.monotonic() < deadline
    return [process.exitcode for process in ranks]


def check_content(checkpoint: Checkpoint) -> None:
    step = checkpoint.step
    for kind, offset in {"student": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5, "teacher": 0.75}.items():
        assert torch.equal(checkpoint.tensor(kind, "block.weight"), weights(step) + offset)
    assert checkpoint.extra == {"step": step}


KILLS = [
    (point, rank, nth)
    for point, rank, times in [
        ("snapshot", 0, [1, 3]),
        ("snapshot", 1, [2]),
        ("shard_write", 0, [1, 4, 5]),
        ("shard_write", 1, [2, 3, 6]),
        ("manifest", 0, [1, 2, 3]),
        ("rename", 0, [1, 2, 4]),
        ("marker", 0, [1, 2, 3]),
        ("retention", 0, [1, 2]),
    ]
    for nth in times
]


@pytest.mark.parametrize(("point", "rank", "nth"), KILLS)
def test_killed_anywhere_the_newest_valid_checkpoint_is_whole(tmp_path: Path, point: str, rank: int, nth: int) -> None:
    codes = run_two(tmp_path, [1, 2, 3, 4, 5], f"{point}:{rank}:{nth}")
    assert codes[rank] == -signal.SIGKILL
    found, _ = find_newest_valid(tmp_path)
    # The save that was hit is lost at most; a commit that was reported is not.
    passes = {"shard_write": 2}.get(point, 1)
    hit = (nth + passes - 1) // passes + (2 if point == "retention" else 0)
    reached = hit if point == "retention" else hit - 1
    assert (found.step if found else 0) == reached
    if found is not None:
        check_content(found)
    start = found.step + 1 if found else 1
    assert run_two(tmp_path, list(range(start, 7))) == [0, 0]
    last, skipped = find_newest_valid(tmp_path)
    assert last is not None
    assert last.step == 6
    assert not skipped
    check_content(last)
    assert not list(tmp_path.glob(".*"))


def test_retention_keeps_the_last_and_every_fourth(tmp_path: Path) -> None:
    assert run_two(tmp_path, list(range(1, 10))) == [0, 0]
    assert committed_steps(tmp_path) == [4, 8, 9]


def test_a_checkpoint_that_cannot_be_deleted_does_not_make_good_saves_look_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rename = Path.rename

    def guarded(path: Path, target: Path) -> Path:
        if path.name == directory_name(1):
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", guarded)
    writer = CheckpointWriter(tmp_path, 0, 1, "s", CheckpointConfig(keep_last=1))
    for step in (1, 2, 3, 4):
        whole = Piece("student", "block.weight", (SIZE,), None, 0, weights(step))
        writer.save(step, [whole], {"completed_updates": step}, {})
        writer._join()
    assert [result.error for result in writer.poll()] == [None] * 4
    assert committed_steps(tmp_path) == [1, 4]
    assert len([line for line in caplog.messages if "could not be deleted" in line]) == 1


@pytest.mark.parametrize("fault", ["shard_write:1:3:enospc", "shard_write:0:4:enospc", "manifest:0:2:enospc"])
def test_a_full_disk_is_survived(tmp_path: Path, fault: str) -> None:
    """The second save fails; the first stays, the third commits."""
    assert run_two(tmp_path, [1, 2, 3], fault) == [0, 0]
    assert committed_steps(tmp_path) == [1, 3]
    found, _ = find_newest_valid(tmp_path)
    assert found is not None
    check_content(found)
    assert not list(tmp_path.glob(".*"))


def test_a_file_size_limit_is_survived(tmp_path: Path) -> None:
    assert run_two(tmp_path, [1, 2], limit=100) == [0, 0]
    assert committed_steps(tmp_path) == [2]


def test_a_failed_save_is_reported_with_its_reason(tmp_path: Path) -> None:
    faults.arm("shard_write:0:1:enospc")
    try:
        writer = CheckpointWriter(tmp_path, 0, 1, "s", CheckpointConfig())
        whole = [Piece("student", "w", (SIZE,), None, 0, weights(1))]
        writer.save(1, whole, {}, {})
        writer._join()
        (failed,) = writer.poll()
        assert failed.error is not None
        assert "No space left" in failed.error
        writer.save(2, whole, {}, {})
        assert writer.finish()
        (saved,) = writer.poll()
        assert saved.error is None
        assert writer.poll() == []
    finally:
        faults.arm("")


def test_the_snapshot_is_what_was_saved(tmp_path: Path) -> None:
    """The loop goes on changing the weights while they are written."""
    writer = CheckpointWriter(tmp_path, 0, 1, "s", CheckpointConfig())
    live = weights(1)
    writer.save(1, [Piece("student", "w", (SIZE,), None, 0, live)], {}, {})
    live.fill_(-1)
    assert writer.finish()
    assert torch.equal(Checkpoint.open(tmp_path / "step-00000001").tensor("student", "w"), weights(1))


def test_a_missing_rank_fails_the_save_after_the_timeout(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 0, 2, "s", CheckpointConfig(peer_timeout=0.2))
    writer.save(1, pieces(1, 0), {}, {})
    writer._join()
    (result,) = writer.poll()
    assert "1 of 2 ranks" in (result.error or "")
    assert find_newest_valid(tmp_path) == (None, [])


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """After a damaged checkpoint was skipped, the run reaches its step a second time."""
    for value in (1, 2):
        writer = CheckpointWriter(tmp_path, 0, 1, f"s{value}", CheckpointConfig())
        writer.save(7, [Piece("student", "w", (SIZE,), None, 0, weights(value))], {}, {})
        assert writer.finish()
    assert torch.equal(Checkpoint.open(tmp_path / "step-00000007").tensor("student", "w"), weights(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_a_damaged_later_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 0, 1, "s", CheckpointConfig(keep_last=1))
    whole = [Piece("student", "w", (SIZE,), None, 0, weights(1))]
    for step in (40, 20, 30):
        writer.save(step, whole, {}, {})
        assert writer.finish()
    assert committed_steps(tmp_path) == [30, 40]
