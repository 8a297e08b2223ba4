"""Growth: what is counted, the exponents and verdicts, the command with its table and plot."""

import json
import sys
from pathlib import Path

import pytest
from launch import run_ranks

from d2v_scale.benchmarks import growth, planned_steps
from d2v_scale.benchmarks.growth import Point
from d2v_scale.parallel import groups

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


def test_exponent_of_a_power_law() -> None:
    points = [Point(size, 3.0 * size**1.5, 7.0 * size) for size in (2, 4, 16)]
    assert growth.exponent(points, "seconds") == pytest.approx(1.5)
    assert growth.exponent(points, "held_bytes") == pytest.approx(1.0)


def test_growth_beyond_theory_is_named() -> None:
    square = [Point(size, size**2, size) for size in (1, 2, 4)]
    assert "FASTER THAN THEORY" in growth.describe("depth", "seconds", square, 1)
    assert growth.describe("width", "seconds", square, 2).endswith("ok")
    assert growth.describe("depth", "held_bytes", square, 1).endswith("ok")


def test_ranks_beyond_the_cores_share_them() -> None:
    assert [growth.ideal_time("weak", world, 2) for world in (1, 2, 4)] == [1, 1, 2]
    assert [growth.ideal_time("strong", world, 2) for world in (1, 2, 4)] == [1, 0.5, 0.5]
    points = [Point(1, 1.0, 1), Point(2, 1.2, 1), Point(4, 4.0, 1)]
    row = growth.describe_ranks("weak", points, 2)
    assert "cores shared" in row
    assert row.endswith("SLOWER THAN 1.5 x THEORY at 4 ranks")


@pytest.mark.usefixtures("world_of_one")
def test_memory_of_depth_and_clones_is_counted() -> None:
    topology = groups.single_process()
    these = [growth._case("depth", 2), growth._case("depth", 4), growth._case("clones", 4)]
    shallow, deep, many = growth.measure(these, (2, 4, 4), topology, 1)
    assert shallow.held_bytes < deep.held_bytes < 2 * shallow.held_bytes
    assert shallow.held_bytes < many.held_bytes < 2 * shallow.held_bytes
    assert min(shallow.seconds, deep.seconds, many.seconds) > 0


def test_plot_has_a_panel_for_each_size(tmp_path: Path) -> None:
    points = [Point(1, 1.0, 10), Point(2, 1.5, 20)]
    growth.draw({"depth": points, "weak": points}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_over_ranks_returns_the_slowest() -> None:
    printed = run_ranks(2, Path(growth.__file__), "2", "1")
    assert len({*printed}) == 2, "rank 0 alone tells what all have agreed on"
    found = json.loads(next(line for line in printed[0].splitlines() if line.startswith("{")))
    assert min(found["seconds"], found["held_bytes"]) > 0


def test_ranks_of_this_machine_are_asked_for_their_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `torch.distributed.run`, whose ranks import nothing else here."""
    (tmp_path / "two.py").write_text(
        "import json, os, sys\n"
        "if os.environ['RANK'] == '0': print('a word'); print(json.dumps({'seconds': 3.0, 'held_bytes': 7}))\n"
        "assert (os.environ['WORLD_SIZE'], sys.argv[1:]) == ('2', ['2', '1'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(growth, "on_ranks", lambda world, _module, *given: planned_steps.on_ranks(world, "two", *given))
    assert growth._over_ranks("strong", 2, 1) == Point(2, 3.0, 7)
