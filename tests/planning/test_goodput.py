"""A published trace of interruptions, replayed through what they cost."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from d2v_scale.planning.goodput import LLAMA3, Costs, Fault, Interruption, Trace, best_interval, replay, table

FAULTS: tuple[Fault, ...] = ("process", "node", "hang", "silent", "planned")
TOOL = Path(__file__).parents[2] / "tools" / "goodput.py"


def costs(**settings: float) -> Costs:
    zero = dict.fromkeys(FAULTS, 0.0)
    given = {"start_up": 0.0, "checkpoint_every": 100.0, "checkpoint_stall": 0.0, **settings}
    return Costs(notice=zero | {"hang": 60.0}, queue=zero | {"node": 30.0}, **given)


def test_the_published_table_has_its_published_sums() -> None:
    assert sum(row.count for row in LLAMA3.rows) == 466
    assert sum(row.count for row in LLAMA3.rows if row.fault != "planned") == 419
    days, wall = LLAMA3.days, LLAMA3.days * 24
    assert wall / 466 == pytest.approx(2.78, abs=0.01), days


def test_every_fault_costs_what_it_is_said_to() -> None:
    trace = Trace("made up", 1.0, 8, tuple(Interruption(fault, 2, fault) for fault in FAULTS))
    found = replay(trace, costs(start_up=10.0, rewind=7.0), 8)
    # Ten starts; of the four kinds that come unannounced two each, half an interval old.
    assert found.lost == {"notice": 120, "queue": 60, "start_up": 100, "repeated": 8 * 50 + 2 * 7, "checkpoint": 0}
    assert found.goodput == pytest.approx(1 - 694 / 86400)
    # Twice the ranks, twice the faults.
    assert replay(trace, costs(start_up=10.0, rewind=7.0), 16).lost["start_up"] == 200


def test_without_faults_only_checkpoints_cost_and_too_many_leave_nothing() -> None:
    assert replay(Trace("none", 2.0, 8, ()), costs(checkpoint_stall=1.0), 8).goodput == pytest.approx(0.99)
    assert replay(LLAMA3, costs(start_up=1e6), 16384).goodput == 0


def test_the_best_interval_is_the_best() -> None:
    best = best_interval(LLAMA3, 5.0, 16384)
    of = {
        factor: replay(LLAMA3, costs(checkpoint_every=factor * best, checkpoint_stall=5.0), 16384).goodput
        for factor in (0.8, 0.95, 1.0, 1.05, 1.25)
    }
    assert max(of, key=of.__getitem__) == 1.0


def test_the_table_says_which_share_of_the_first_ways_loss_is_gone() -> None:
    two = [("now", replay(LLAMA3, costs(start_up=200.0), 16384)), ("then", replay(LLAMA3, costs(), 16384))]
    last = table(two).splitlines()[-1]
    lost = [sum(found.lost.values()) for _, found in two]
    assert last.startswith("| then |")
    assert last.endswith(f"| {1 - lost[1] / lost[0]:.0%} |")


def test_the_tool_replays_and_refuses_what_means_nothing(tmp_path: Path) -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False)

    done = run("--trace", "llama3", "--ranks", "16384")
    assert done.returncode == 0
    assert "466 interruptions, one in 2.8 h" in done.stdout
    said = (TOOL.parents[1] / "docs" / "faults.md").read_text()
    shares = [line.split("|")[2].strip() for line in done.stdout.splitlines() if "%" in line]
    assert len(shares) == 5
    assert all(f"{float(share[:-1]):.1f} %" in " ".join(said.split()) for share in shares)
    assert run("--ranks", "0").returncode == run("--measured", str(tmp_path)).returncode == 2
    lines = [
        {"event": "begin", "time": 9, "started": 0, "allocated": None, "restart": 0, "resumed": 0},
        {"event": "at", "time": 20, "step": 1, "spent": {}},
        {"event": "begin", "time": 40, "started": 26, "allocated": None, "restart": 1, "resumed": 0},
        {"event": "at", "time": 56, "step": 1, "spent": {}},
    ]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # 20 and 30 s of start-up, 466 times.
    assert f"| {466 * 25 / 3600:.1f} |" in run("--measured", str(tmp_path)).stdout
    copies = [{"step": k, "samples": k, "time": 100.0 * k, "memory_copy_stall_seconds": 2.0} for k in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in copies))
    # A stall of 2 s every 100 s, and one of 36 s an hour, are 3 % of the time.
    again = run("--measured", str(tmp_path), "--checkpoint_stall", "36").stdout
    assert f"| {54 * 24 * 0.03:.1f} |" in again.splitlines()[-1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("goodput_tool", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_a_spare_that_took_a_place_is_measured_beside_other_restarts(tmp_path: Path) -> None:
    tool = load()
    lines = []
    for start, excluded in ((0, []), (103, []), (220, ["n2"])):
        begin = {"event": "begin", "time": start + 5, "started": start, "allocated": None, "restart": 1, "resumed": 0}
        lines += [begin | {"excluded": excluded}, {"event": "at", "time": start + 100, "step": 1, "spent": {}}]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = tool.make_parser().parse_args(["--measured", str(tmp_path)])
    assert tool.measure(options) is None
    assert (options.notice, options.spare) == (3.0, 14.0)


def test_who_is_requeued_is_noticed_as_in_a_requeue() -> None:
    tool = load()
    given = ["--notice", "2", "--notice_requeue", "26", "--queue", "121", "--node_queue", "121", "--spare", "10"]
    ways = [way for _, way in tool.ways(tool.make_parser().parse_args(given), 300.0)]
    requeued = [[fault for fault in FAULTS if way.queue[fault] == 121] for way in ways]
    assert requeued == [[*FAULTS], [*FAULTS], ["node", "planned"], ["planned"], ["planned"]]
    for way, faults in zip(ways, requeued, strict=True):
        noticed = {fault: 26.0 if fault in faults else 2.0 for fault in FAULTS if fault != "hang"}
        assert {fault: way.notice[fault] for fault in noticed} == noticed
