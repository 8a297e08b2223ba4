"""State in the memory of nodes: who holds whose shard, what is trusted, what becomes of it when something is lost."""

import contextlib
import os
import socket
import struct
import time
from pathlib import Path

import pytest
from launch import run_ranks

from d2v_scale.checkpoint.config import MemoryConfig
from d2v_scale.checkpoint.memory_files import (
    FORGOTTEN_S,
    Identity,
    MemoryFolder,
    base_directory,
    forget_run,
    read_report,
    report_text,
    run_name,
)
from d2v_scale.checkpoint.memory_nodes import Member, Room, Seat, lack_of_room, nodes_of, peers, place_of
from d2v_scale.checkpoint.memory_wire import Address, CopyServer
from d2v_scale.errors import CheckpointError, ConfigError
from d2v_scale.run_files.run_start import forget_failed_start

IDENTITY = Identity("run", 2, "digest", 0)


def test_two_nodes_survive_every_loss_that_leaves_a_copy(tmp_path: Path) -> None:
    outputs = run_ranks(2, Path(__file__).with_name("memory_worker.py"), str(tmp_path), env={"LOCAL_WORLD_SIZE": "1"})
    assert all(output.rstrip().endswith("all scenarios passed") for output in outputs)


def test_a_shard_is_held_at_the_same_place_of_the_next_node() -> None:
    assert peers(list("aabbcc")) == [2, 3, 4, 5, 0, 1]
    assert peers(list("abab")) == [1, 0, 3, 2]
    assert peers(list("aab")) == [2, 2, 0]
    assert peers(list("aa")) == [None, None]
    assert [place_of(rank, list("abab")) for rank in range(4)] == [0, 0, 1, 1]


def test_what_dies_together_is_a_machine_or_on_one_machine_a_group_of_ranks() -> None:
    here = [Seat.find({"RANK": str(rank), "LOCAL_WORLD_SIZE": "2", "SLURMD_NODENAME": "n"}) for rank in range(4)]
    assert nodes_of(here) == ["n, group 0"] * 2 + ["n, group 1"] * 2
    # Ranks that were dealt out to machines one by one.
    dealt = [Seat("m", f"n{rank % 2}", rank // 2) for rank in range(4)]
    assert nodes_of(dealt) == ["n0", "n1", "n0", "n1"]
    assert nodes_of([Seat.find({"RANK": "1"}), Seat.find({"RANK": "0"})])[0].endswith("group 0")


def test_room_is_counted_for_two_generations_of_own_and_of_held_shards() -> None:
    members = [Member(f"m{rank // 2}", f"m{rank // 2}", Address("", 0)) for rank in range(4)]
    # On each machine two ranks of 10 bytes, and two shards of the other's.
    assert not lack_of_room(members, [Room(10, 1, "/shm", 80, 0)] * 4)
    assert not lack_of_room(members, [Room(10, 1, "/shm", 60, 20)] * 4)
    said = lack_of_room(members, [Room(10, 1, "/shm", 80, 0)] * 2 + [Room(10, 1, "/shm", 79, 0)] * 2)
    assert said == "/shm of m1 has 7.9e-08 GB free, and two generations of copies take 8e-08 GB there"
    # Two nodes that are one machine share its memory.
    one = [Member("m", str(rank), Address("", 0)) for rank in range(2)]
    assert not lack_of_room(one, [Room(10, 1, "/a", 80, 0), Room(10, 1, "/b", 80, 0)])
    assert lack_of_room(one, [Room(10, 1, "/a", 79, 0), Room(10, 1, "/b", 79, 0)])
    assert not lack_of_room(one, [Room(10, 1, "/a", 70, 5), Room(10, 1, "/b", 70, 5)])


def test_a_report_says_what_it_is_of_and_a_damaged_one_nothing() -> None:
    text = report_text(IDENTITY, "session", 4, 1, {"file": {}})
    found = read_report(text)
    assert (found["step"], found["rank"], found["session"]) == (4, 1, "session")
    assert IDENTITY.differs(found) == ""
    assert IDENTITY.differs(found | {"world_size": 4}) == "is of 4 ranks, and here are 2"
    with pytest.raises(CheckpointError, match="damaged"):
        read_report(text.replace('"step":4', '"step":5'))


def test_a_damaged_report_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = MemoryFolder(str(tmp_path), "run")
    for rank, text in enumerate((report_text(IDENTITY, "s", 4, 0, {}), "nonsense", "")):
        folder.place("own", 4, rank).with_suffix(".json").write_text(text)
    assert [one.rank for one in folder.copies(IDENTITY, 0, 1)] == [0]
    assert caplog.text.count("is passed over: its report is damaged") == 2


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    users = tmp_path / f"d2v_scale-{os.getuid()}"
    users.mkdir()
    users.chmod(0o777)
    with pytest.raises(ConfigError, match=r"checkpoint\.memory\.dir: .*another user's"):
        MemoryFolder(str(tmp_path), "run")
    users.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    users.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="another user's"):
        MemoryFolder(str(tmp_path), "run")


def test_where_copies_go_is_named_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_MEMORY", "/ram")
    assert base_directory("$NODE_MEMORY/d2v") == Path("/ram/d2v")
    assert base_directory("auto") == Path("/dev/shm")
    for wrong in ("$NOWHERE_SET/d2v", "relative"):
        with pytest.raises(ConfigError, match=r"checkpoint\.memory\.dir: is "):
            base_directory(wrong)


def test_what_nobody_came_back_for_is_removed_after_a_day(tmp_path: Path) -> None:
    old, mine = MemoryFolder(str(tmp_path), "old"), MemoryFolder(str(tmp_path), "mine")
    old.place("own", 4, 0).write_bytes(b"x")
    mine.remove_forgotten(time.time() + FORGOTTEN_S - 60)
    assert old.path.exists()
    mine.remove_forgotten(time.time() + FORGOTTEN_S + 60)
    assert not old.path.exists()
    assert mine.path.exists()


def test_a_run_that_is_stopped_for_good_is_forgotten_by_its_own_name_alone(tmp_path: Path) -> None:
    memory = str(tmp_path / "memory")
    for name in ("a", "b"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "recipe.yaml").write_text(f"checkpoint: {{memory: {{dir: {memory}}}}}")
    folders = [MemoryFolder(memory, run_name(tmp_path / name / "checkpoints", make=True)) for name in ("a", "b")]
    assert forget_run(tmp_path / "a")
    assert [folder.path.exists() for folder in folders] == [False, True]
    assert not forget_run(tmp_path / "a")
    assert not forget_run(tmp_path / "never")


def test_a_run_that_begins_anew_goes_on_from_no_copy_of_the_start_that_failed(tmp_path: Path) -> None:
    """Whose recipe may be the same, and the weights that it began from others."""
    root = tmp_path / "checkpoints"
    root.mkdir()
    name = run_name(root, make=True)
    assert run_name(root, make=True) == name
    forget_failed_start(tmp_path)
    assert run_name(root, make=False) == ""
    assert run_name(root, make=True) != name


def test_of_a_stranger_who_announces_a_long_message_nothing_is_read(tmp_path: Path) -> None:
    server = CopyServer(MemoryFolder(str(tmp_path), "run"), "secret", "127.0.0.1")
    with socket.create_connection(("127.0.0.1", server.port), timeout=50) as stranger:  # less than the server waits
        stranger.sendall(b"guessed.".ljust(32) + struct.pack("!I", 1 << 27))
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    server.close()


def test_copies_are_due_at_their_steps() -> None:
    assert [step for step in range(9) if MemoryConfig(every=4).due(step)] == [0, 4, 8]
    assert not MemoryConfig().due(4)
