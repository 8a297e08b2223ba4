"""One of two ranks, each a node with a memory file system of its own: every kind of loss, one after the other."""

import logging
import os
import shutil
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from d2v_scale.checkpoint import memory_wire
from d2v_scale.checkpoint.config import MemoryConfig
from d2v_scale.checkpoint.format import Piece
from d2v_scale.checkpoint.memory import HeldCheckpoint, MemoryCopies, newest_anywhere
from d2v_scale.checkpoint.single import write_single
from d2v_scale.process import faults
from d2v_scale.process.signals import Agreement

SIZE = 37
KINDS = {"student": 0.0, "exp_avg": 0.25, "exp_avg_sq": 0.5, "teacher": 0.75}
ROOT = Path(sys.argv[1])
RANK = int(os.environ["RANK"])
CONFIG = MemoryConfig(every=2, dir="$NODE_MEMORY")
os.environ["NODE_MEMORY"] = str(ROOT / f"node-{RANK}")


class Said(logging.Handler):
    """What was logged since the last look."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def take(self) -> str:
        said, self.lines = "\n".join(self.lines), []
        return said


said = Said()


def weights(step: int) -> torch.Tensor:
    return torch.arange(SIZE, dtype=torch.float32) + 1000.0 * step


def pieces(step: int) -> list[Piece]:
    """Rank 0 has the first 20 elements and the state, rank 1 the rest."""
    start, stop = (0, 20) if RANK == 0 else (20, SIZE)
    found = [
        Piece(kind, "block.weight", (SIZE,), None, start, weights(step)[start:stop] + offset)
        for kind, offset in KINDS.items()
    ]
    return [*found, Piece("state", "codes", (3,), None, 0, torch.full((3,), float(step)))] if RANK == 0 else found


def begin(digest: str = "d", branch: int = 0, root: str = "run") -> MemoryCopies:
    """An attempt."""
    (ROOT / root / "checkpoints").mkdir(parents=True, exist_ok=True)
    return MemoryCopies.create(CONFIG, ROOT / root / "checkpoints", digest, branch)


def take(copies: MemoryCopies, step: int, fault: str = "") -> bool:
    faults.arm(fault)
    if not copies.may_begin(step, agreement.least):
        return False
    copies.save(step, pieces(step), {"completed_updates": step}, {"step": step})
    copies.wait()
    dist.barrier()
    faults.arm("")
    return True


def end(copies: MemoryCopies) -> None:
    """The ranks are lost; what they wrote stays."""
    dist.barrier()
    copies.close(keep=True)
    dist.barrier()


def restored(copies: MemoryCopies, after: int = -1) -> int | None:
    """Which step is found, every value of it checked on both ranks."""
    found = copies.newest(after)
    if found is None:
        return None
    assert isinstance(found, HeldCheckpoint)
    assert found.extra == {"step": found.step}
    assert found.manifest.state == {"completed_updates": found.step}
    for kind, offset in KINDS.items():
        assert torch.equal(found.tensor(kind, "block.weight"), weights(found.step) + offset)
        assert torch.equal(found.read(kind, "block.weight", None, 15, 12), weights(found.step)[15:27] + offset)
    assert torch.equal(found.tensor("state", "codes"), torch.full((3,), float(found.step)))
    assert copies.folder.place("own", found.step, RANK).exists()
    dist.barrier()
    return found.step


def generations(copies: MemoryCopies) -> list[str]:
    return sorted(str(path.relative_to(copies.folder.path)) for path in copies.folder.path.glob("*/step-*/*.json"))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def two_generations_are_kept_and_the_newest_is_found() -> None:
    copies = begin()
    assert restored(copies) is None
    for step in (2, 4, 6):
        assert take(copies, step)
    steps = [
        f"{kind}/step-0000000{step}/rank-0000{rank}.json"
        for kind, rank in (("held", 1 - RANK), ("own", RANK))
        for step in (4, 6)
    ]
    assert generations(copies) == steps
    assert restored(copies) == 6
    end(copies)
    copies = begin()
    assert restored(copies) == 6
    assert restored(copies, after=6) is None
    end(copies)


def a_lost_node_gets_its_shard_from_the_next() -> None:
    if RANK == 0:
        shutil.rmtree(ROOT / "node-0")
    said.take()
    copies = begin()
    assert restored(copies) == 6
    assert (RANK == 0) == ("The shard of step 6 came from" in said.take())
    copies.wait()
    dist.barrier()
    # The node that came instead holds what the lost one held: the other may be lost next.
    assert f"held/step-00000006/rank-0000{1 - RANK}.json" in generations(copies)
    end(copies)
    if RANK == 1:
        shutil.rmtree(ROOT / "node-1")
    copies = begin()
    assert restored(copies) == 6
    end(copies)


def a_wrong_checksum_is_named_and_the_other_copy_taken() -> None:
    copies = begin()
    if RANK == 1:
        damage(copies.folder.place("own", 6, 1))
    assert restored(copies) == 6
    assert copies.lost == 1
    assert (RANK == 1) == ("rank-00001.safetensors is damaged: its checksum" in said.take())
    # The sound one lies in its place now.
    assert restored(copies) == 6
    assert copies.lost == 1
    end(copies)


def without_a_sound_shard_the_older_generation_is_taken() -> None:
    copies = begin()
    assert take(copies, 8)
    assert take(copies, 10)
    end(copies)
    damage(copies.folder.place("own", 10, 1) if RANK == 1 else copies.folder.place("held", 10, 1))
    copies = begin()
    assert restored(copies) == 8
    assert copies.lost == 2
    assert RANK == 1 or "step 10 is passed over: nobody has a sound shard of rank 1" in said.take()
    end(copies)


def a_copy_that_not_all_have_written_is_none() -> None:
    copies = begin()
    (copies.folder.place("own", 8, 1) if RANK == 1 else copies.folder.place("held", 8, 1)).with_suffix(".json").unlink()
    assert copies.newest(8) is None
    assert copies.newest(-1) is None
    assert RANK == 1 or "step 8 is passed over: nobody has the shard of rank 1" in said.take()
    end(copies)


def a_full_memory_costs_a_copy_and_no_more() -> None:
    copies = begin()
    assert take(copies, 20)
    for point in ("memory_write", "memory_send"):
        lost = copies.lost
        assert take(copies, 22, f"{point}:1:1:enospc")
        assert (RANK == 1) == (": OSError: [Errno 28]" in said.take())
        assert copies.lost == lost
        end(copies)
        # Written and not sent it still is one, as long as no node is lost.
        again = begin()
        assert restored(again) == (20 if point == "memory_write" else 22)
        again.close(keep=True)
        dist.barrier()
        copies = begin()
        copies._whole = copies._begun = copies._own = 20
    end(copies)
    copies = begin()
    assert restored(copies) == 22
    assert take(copies, 24, "memory_write:0:1:enospc")
    assert take(copies, 26)
    assert copies.lost == 1
    assert RANK == 1 or "step 24 did not become whole, that of step 22 is kept" in said.take()
    assert restored(copies) == 26
    end(copies)


def shards_of_two_attempts_are_never_put_together() -> None:
    copies = begin()
    assert take(copies, 28)
    assert take(copies, 30)
    end(copies)
    copies = begin()
    assert restored(copies, after=28) == 30
    copies._whole = 28
    assert take(copies, 30, "memory_write:1:1:raise")
    end(copies)
    copies = begin()
    assert restored(copies) == 28
    end(copies)


def nobody_waits_for_the_last_copy() -> None:
    copies, go = begin(), threading.Event()
    if RANK == 1:
        copies._thread = threading.Thread(target=go.wait)
        copies._thread.start()
    assert not take(copies, 32)
    assert copies.lost == 1
    go.set()
    copies.wait()
    assert take(copies, 34)
    end(copies)


def what_is_of_another_run_is_not_trusted_by_its_name() -> None:
    copies = begin()
    assert restored(copies) == 34
    end(copies)
    for other, why in (
        ({"digest": "other"}, "is of another configuration"),
        ({"branch": 1}, "is from before the run went back"),
    ):
        copies = begin(**other)  # type: ignore[arg-type]
        said.take()
        assert restored(copies) is None
        assert why in said.take()
        end(copies)
    foreign = begin(root="other")
    shutil.rmtree(foreign.folder.path)
    shutil.copytree(copies.folder.path, foreign.folder.path)
    dist.barrier()
    assert restored(foreign) is None
    assert "is of another run" in said.take()
    end(foreign)
    copies = begin()
    assert restored(copies) == 34
    copies.go_back()
    assert restored(copies) is None
    end(copies)


def the_disk_is_taken_where_it_is_newer() -> None:
    copies, root = begin(), ROOT / "run" / "checkpoints"
    if RANK == 0:
        write_single(root, {"block.weight": weights(36)}, step=36)
    dist.barrier()
    checkpoint, on_disk = newest_anywhere(root, copies)
    assert checkpoint is not None
    assert (checkpoint.step, on_disk, type(checkpoint).__name__) == (36, 36, "Checkpoint")
    assert take(copies, 38)
    checkpoint, on_disk = newest_anywhere(root, copies)
    assert checkpoint is not None
    assert (checkpoint.step, on_disk, type(checkpoint).__name__) == (38, 36, "HeldCheckpoint")
    dist.barrier()
    if RANK == 0:
        write_single(root, {"block.weight": weights(40)}, step=40)
        damage(root / "step-00000040" / "rank-00000.safetensors")
    dist.barrier()
    # A checkpoint that is newer and damaged is no reason to pass over the memory.
    checkpoint, on_disk = newest_anywhere(root, copies)
    assert checkpoint is not None
    assert (checkpoint.step, on_disk) == (38, 36)
    if RANK == 0:
        damage(root / "step-00000036" / "rank-00000.safetensors")
    dist.barrier()
    checkpoint, on_disk = newest_anywhere(root, copies)
    assert checkpoint is not None
    assert (checkpoint.step, on_disk) == (38, -1)
    end(copies)


def a_peer_without_the_secret_gets_nothing() -> None:
    copies = begin()
    assert restored(copies) == 38
    other = copies.members[1 - RANK].address
    for wrong in ("", "guessed"):
        try:
            memory_wire.read(other, wrong, 1 - RANK, "student/block.weight", 0, 1)
        except OSError:
            continue
        raise AssertionError("it answered")
    end(copies)


def a_run_that_is_over_leaves_nothing() -> None:
    copies = begin()
    dist.barrier()
    copies.close(keep=False)
    dist.barrier()
    assert not copies.folder.path.exists()


if __name__ == "__main__":
    logging.getLogger("d2v_scale").addHandler(said)
    logging.getLogger("d2v_scale").setLevel(logging.INFO)
    dist.init_process_group("gloo")
    agreement = Agreement()
    for scenario in (
        two_generations_are_kept_and_the_newest_is_found,
        a_lost_node_gets_its_shard_from_the_next,
        a_wrong_checksum_is_named_and_the_other_copy_taken,
        without_a_sound_shard_the_older_generation_is_taken,
        a_copy_that_not_all_have_written_is_none,
        a_full_memory_costs_a_copy_and_no_more,
        shards_of_two_attempts_are_never_put_together,
        nobody_waits_for_the_last_copy,
        what_is_of_another_run_is_not_trusted_by_its_name,
        the_disk_is_taken_where_it_is_newer,
        a_peer_without_the_secret_gets_nothing,
        a_run_that_is_over_leaves_nothing,
    ):
        print(scenario.__name__, flush=True)
        scenario()
        dist.barrier()
    print("all scenarios passed", flush=True)
