"""What the ranks of a node are told, and how a spare one looks at its devices."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v_scale.agents import own_ranks
from d2v_scale.agents.plan import Plan
from d2v_scale.process.started import excluded
from d2v_scale.running.restarts import Restarts

RANK = """
import json, os, sys
json.dump([dict(os.environ), sys.argv], open(f"{sys.argv[1]}/{os.environ['RANK']}", "w"))
"""


def until(what: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_ranks_know_their_place_in_the_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = {"RANK": "7", "WORLD_SIZE": "9", "MASTER_PORT": "1", "D2V_SCALE_STARTED": "5"}
    (tmp_path / "run_dir").write_text(str(tmp_path))
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    own = own_ranks.OwnRanks(command, 2, left, Restarts(1, tmp_path, []))
    plan = Plan(3, ("n1", "n4", "n2"), {"n3": "why: it; is gone"}, ("--run_dir", "x"), time=77.5)
    own.start(plan, 1, "10.0.0.1", 1234)
    until(lambda: own.poll(0, ()) == 0)
    assert own.gone() == (2, 3)
    told = [json.loads((tmp_path / str(rank)).read_text()) for rank in (2, 3)]
    for rank, (environment, words) in enumerate(told):
        expected = {"RANK": str(2 + rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2"}
        expected |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
        expected |= {"D2V_SCALE_RESTART": "2", "D2V_SCALE_STARTED": "77.5"}
        expected |= {"D2V_SCALE_TELL_RUN_DIR": str(tmp_path / "run_dir")}
        assert expected.items() <= environment.items()
        assert words[2:] == ["--run_dir", "x"]
    monkeypatch.setenv("D2V_SCALE_EXCLUDED", told[0][0]["D2V_SCALE_EXCLUDED"])
    assert excluded() == {"n3": "why: it; is gone"}


def test_ranks_elsewhere_that_wrote_their_part_of_a_checkpoint_are_no_reason_to_end_it(tmp_path: Path) -> None:
    (tmp_path / "run_dir").write_text(str(tmp_path))
    parts = tmp_path / "checkpoints/.tmp-step-00000004-a"
    parts.mkdir(parents=True)
    (parts / "rank-00005.json").touch()
    own = own_ranks.OwnRanks([sys.executable, "-c", "import time; time.sleep(60)"], 1, {}, Restarts(1, tmp_path, []))
    own.start(Plan(1, ("n1", "n2")), 0, "127.0.0.1", 1)
    try:
        begun = time.monotonic()
        while time.monotonic() < begun + 1.0:  # longer than `RESTART_GRACE_S`
            assert own.poll(137, {5}) is None
            time.sleep(0.02)
        until(lambda: own.poll(137, {5, 6}) is not None)
    finally:
        own.kill()


@pytest.mark.parametrize(
    ("check", "says"),
    [
        ("print('a library says'); print()", ""),
        ("print('cuda:0 does not compute')", "cuda:0 does not compute"),
        ("raise SystemExit(3)", "its devices cannot be asked"),
    ],
)
def test_a_spare_looks_at_its_devices(monkeypatch: pytest.MonkeyPatch, check: str, says: str) -> None:
    monkeypatch.setattr(own_ranks, "_CHECK", check)
    known = "one GPU of eight"
    assert own_ranks.Devices(1, {}, known).problem() == known
    with monkeypatch.context() as soon:
        soon.setattr(own_ranks, "CHECK_EVERY_S", 0.0)
        devices = own_ranks.Devices(1, {}, known)
    assert devices.problem() == known, "nobody has looked yet"
    until(lambda: devices.problem() != known)
    assert devices.problem() == says


def test_devices_that_never_answer_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_ranks, "_CHECK", "import time; time.sleep(600)")
    monkeypatch.setattr(own_ranks, "CHECK_EVERY_S", 0.1)
    devices = own_ranks.Devices(1, {})
    until(lambda: devices.problem() == "its devices have not answered for 0 s")
    devices.end()
