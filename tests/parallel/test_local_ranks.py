"""`d2v train` on several processes: signals reach all of them, and their exit code comes back."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from d2v_scale.parallel import local_ranks

# A rank: writes down what it was told, sets its handlers after a while, and ends as it is asked to.
RANK = """
import json, os, signal, sys, time
folder, slow, how = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
rank = os.environ["RANK"]
open(f"{folder}/begun-{rank}", "w").close()
time.sleep(slow)
def stop(number, _frame):
    open(f"{folder}/stopped-{rank}", "a").write(f"{number}\\n")
    signal.signal(number, signal.SIG_DFL)  # as an interpreter does that ends
    time.sleep(0.5)
    os._exit(10)
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
signal.signal(signal.SIGUSR2, lambda *_: open(f"{folder}/profiled-{rank}", "w").close())
told = {key: value for key, value in os.environ.items() if key in ("RANK", "LOCAL_RANK", "WORLD_SIZE",
        "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "D2V_SCALE_STARTED")}
json.dump(told, open(f"{folder}/.{rank}", "w"))
os.rename(f"{folder}/.{rank}", f"{folder}/rank-{rank}")
code = how[int(rank)]
if code is None:
    time.sleep(60)
elif code < 0:
    os.kill(os.getpid(), -code)
    time.sleep(60)
sys.exit(code)
"""
LAUNCHER = """
import os, sys
from d2v_scale.parallel import local_ranks
local_ranks.GRACE_S = 0.5
sys.exit(local_ranks.run([sys.executable, "-c", *sys.argv[1:]], 2, os.environ, share_cores=True))
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., "subprocess.Popen[str]"]:
    def call(*how: int | None, slow: float = 0.0) -> "subprocess.Popen[str]":
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        env |= {"WORLD_SIZE": "7", "MASTER_PORT": "1"}  # left by something else
        command = [sys.executable, "-c", LAUNCHER, RANK, str(tmp_path), str(slow), json.dumps(how)]
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    return call


def until(what: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


Start = Callable[..., "subprocess.Popen[str]"]


def test_every_rank_knows_its_place(start: Start, tmp_path: Path) -> None:
    assert start(0, 0).wait(30) == 0
    told = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert [one.pop("RANK") for one in told] == [one.pop("LOCAL_RANK") for one in told] == ["0", "1"]
    assert told[0] == told[1]
    assert (told[0]["WORLD_SIZE"], told[0]["LOCAL_WORLD_SIZE"], told[0]["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
    assert int(told[0]["MASTER_PORT"]) > 1024
    assert int(told[0]["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize(("how", "code"), [((0, 13), 13), ((2, 2), 2), ((0, -9), 137), ((-11, 0), 139)])
def test_the_code_of_the_ranks_comes_back(start: Start, how: tuple[int, int], code: int) -> None:
    assert start(*how).wait(30) == code


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_every_rank_and_nobody_dies_of_it(start: Start, tmp_path: Path, number: int) -> None:
    launcher = start(None, None)
    until(lambda: all((tmp_path / f"rank-{rank}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGUSR2)
    until(lambda: all((tmp_path / f"profiled-{rank}").exists() for rank in range(2)))
    launcher.send_signal(number)
    if number == signal.SIGHUP:  # this rank has no handler for it, and dies as it would without a launcher
        assert launcher.wait(30) == 128 + number
        return
    assert launcher.wait(30) == 10
    assert [(tmp_path / f"stopped-{rank}").read_text() for rank in range(2)] == [f"{int(number)}\n"] * 2


def test_ranks_hear_when_the_run_was_asked_for(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = str(time.time() + 1000)  # than this launcher was started, as a notebook is long before
    monkeypatch.setenv("D2V_SCALE_STARTED", later)
    assert start(0, 0).wait(30) == 0
    assert [json.loads((tmp_path / f"rank-{rank}").read_text())["D2V_SCALE_STARTED"] for rank in range(2)] == [
        later
    ] * 2


def test_a_signal_while_the_ranks_start_is_neither_lost_nor_deadly(start: Start, tmp_path: Path) -> None:
    launcher = start(None, None, slow=1.0)
    until(lambda: all((tmp_path / f"begun-{rank}").exists() for rank in range(2)))
    launcher.send_signal(signal.SIGUSR1)
    assert launcher.wait(30) == 10
    assert all((tmp_path / f"stopped-{rank}").exists() for rank in range(2))


def test_peers_of_a_failed_rank_are_not_waited_for_without_end(start: Start) -> None:
    began = time.monotonic()
    assert start(None, 3).wait(30) == 3
    assert time.monotonic() - began < 25


AGAIN = """
import json, os, sys, time
from pathlib import Path
from d2v_scale.parallel import local_ranks
folder, codes = Path(sys.argv[1]), json.loads(sys.argv[2])
def again(code, since):
    assert time.time() - 60 < since < time.time()
    (folder / "ended").open("a").write(f"{code} ")
    return None if len((folder / "ended").read_text().split()) >= len(codes) else ["again"]
local_ranks.RESTART_GRACE_S = 0.3
def is_saving(ended):
    return 1 in ended and (folder / "saving").exists()
command = [sys.executable, "-c", sys.argv[3], *sys.argv[1:3]]
sys.exit(local_ranks.run(command, 2, os.environ, share_cores=True, again=again, is_saving=is_saving))
"""
# A rank: says what it was told; rank 1 ends as it is asked to, its peer does not notice that.
ATTEMPT = r"""
import json, os, signal, sys, time
folder, codes, attempt = sys.argv[1], json.loads(sys.argv[2]), int(os.environ["D2V_SCALE_RESTART"])
signal.signal(signal.SIGTERM, lambda *_: os._exit(10))
said = [os.environ["RANK"], os.environ["MASTER_PORT"], os.environ["D2V_SCALE_STARTED"], sys.argv[3:]]
open(f"{folder}/attempts", "a").write(json.dumps([attempt, *said]) + "\n")
code = codes[attempt]
if os.environ["RANK"] == "0" and code:
    if os.path.exists(f"{folder}/saving"):
        time.sleep(2.5)  # since this rank began: long after the other one's end
        open(f"{folder}/saved", "w").close()
        os.remove(f"{folder}/saving")
    time.sleep(60)
time.sleep(0.5)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def run_again(folder: Path, codes: list[int]) -> "subprocess.Popen[str]":
    """The code that rank 1 ends with in each attempt; another one is not started after the last."""
    return subprocess.Popen([sys.executable, "-c", AGAIN, str(folder), json.dumps(codes), ATTEMPT], text=True)


def test_ranks_are_started_again_as_long_as_it_is_worth_it(tmp_path: Path) -> None:
    assert run_again(tmp_path, [-9, 1, 0]).wait(60) == 0
    assert (tmp_path / "ended").read_text().split() == ["137", "1"]
    said = [json.loads(line) for line in (tmp_path / "attempts").read_text().splitlines()]
    assert sorted((attempt, rank) for attempt, rank, *_ in said) == [(a, r) for a in range(3) for r in "01"]
    # Each attempt has a port of its own, for the last one may still be taken, and says when it was begun.
    for place in (2, 3):
        assert len({one[place] for one in said}) == 3
    assert [one[4] for one in sorted(said)] == [[], [], ["again"], ["again"], ["again"], ["again"]]


def test_the_last_code_comes_back_when_ranks_are_not_started_again(tmp_path: Path) -> None:
    assert run_again(tmp_path, [1, 14]).wait(60) == 14
    assert (tmp_path / "ended").read_text().split() == ["1", "14"]


def test_ranks_that_write_a_checkpoint_are_given_the_time_for_it(tmp_path: Path) -> None:
    (tmp_path / "saving").touch()
    assert run_again(tmp_path, [-9]).wait(60) == 137
    assert (tmp_path / "saved").exists()


def test_rank_0_may_finish_its_last_words_before_ranks_are_given_up() -> None:
    group = local_ranks.Ranks(restarts=True)
    assert group._grace_s(12) == local_ranks.Ranks(restarts=False)._grace_s(137) == local_ranks.GRACE_S
    assert group._grace_s(137) == group._grace_s(1) == local_ranks.RESTART_GRACE_S < group._grace_s(10)
    group.on_signal(signal.SIGTERM, None)
    assert group._grace_s(10) == local_ranks.GRACE_S


def test_ranks_that_were_asked_to_stop_are_not_started_again(tmp_path: Path) -> None:
    launcher = run_again(tmp_path, [7, 7, 7])
    until(lambda: (tmp_path / "attempts").exists())
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) in (7, 10)
    assert not (tmp_path / "ended").exists()


def test_gpus_are_counted_as_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_ranks.count_gpus({"DS_ACCELERATOR": "cpu"}) == 0
    asked = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "a warning of some library\n4\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(local_ranks.rank_environment, "may_have_gpu", lambda _: True)
    assert local_ranks.count_gpus({}) == 4
    assert "device_count" in asked[0][-1]
    # Where no driver has a device there is nothing to ask: importing PyTorch takes seconds.
    monkeypatch.setattr(local_ranks.rank_environment, "may_have_gpu", lambda _: False)
    assert local_ranks.count_gpus({}) == 0
    assert len(asked) == 1
