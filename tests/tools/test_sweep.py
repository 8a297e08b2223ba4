"""Sweeps: every combination once, mistakes before anything runs, the table is read from the records."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
sys.path.append(str(TOOLS))

import sweep  # noqa: E402

from d2v_scale.errors import ConfigError, UserError  # noqa: E402
from d2v_scale.status import write_status  # noqa: E402


def options(out: Path, *grid: str, seeds: tuple[int, ...] = (1, 2), equal_compute: bool = False) -> argparse.Namespace:
    return argparse.Namespace(
        recipe="tiny2_vision",
        grid=list(grid),
        seeds=list(seeds),
        out=out,
        training=["--data=shards/*.tar"],
        equal_compute=equal_compute,
        jobs=1,
        dry_run=True,
    )


def test_axes_multiply_and_joined_keys_move_together(tmp_path: Path) -> None:
    grid = ("objective.masking.kind+objective.masking.inverse=random+false,block2d+true", "optim.lr=1e-3,2e-3")
    points = sweep.points_of(options(tmp_path, *grid))
    assert len(points) == len({point.run_dir for point in points}) == 2 * 2 * 2
    assert len({point.label for point in points}) == 4
    assert all(("inverse", "true") in [(k.rpartition(".")[2], v) for k, v in p.settings] for p in points[4:])


@pytest.mark.parametrize("axis", ["optim.lr", "a+b=1,2", "a+b=1+2,3", "a+b=1+,2+3"])
def test_an_axis_that_is_none_is_refused(axis: str) -> None:
    with pytest.raises(UserError, match="--grid"):
        sweep.axis_of(axis)


def test_a_wrong_key_or_value_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        sweep.points_of(options(tmp_path, "optim.learning_rate=1,2"))
    with pytest.raises(ConfigError, match="top_k_layers"):
        sweep.points_of(options(tmp_path, "objective.target.top_k_layers=1,99"))


def test_a_sweep_that_evaluates_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = options(tmp_path, "optim.lr=1e-3,2e-3")
    sweep.points_of(blind)
    assert "warning: no run is evaluated" in capsys.readouterr().err
    blind.training += ["--evaluation.train=shards/*.tar", "--evaluation.test=shards/*.tar"]
    sweep.points_of(blind)
    assert capsys.readouterr().err == ""


def test_equal_compute_gives_more_masks_fewer_steps(tmp_path: Path) -> None:
    few, many = sweep.points_of(
        options(tmp_path, "objective.masking.clones=1,8", seeds=(1,), equal_compute=True)
    )  # fmt: skip

    def steps(point: sweep.Point) -> int:
        (given,) = [a for a in point.arguments if a.startswith("--optim.max_steps=")]
        return int(given.partition("=")[2])

    assert steps(few) > sweep.parse(["--recipe=tiny2_vision"])[0].optim.max_steps > steps(many)


def test_the_table_is_read_from_the_records(tmp_path: Path) -> None:
    points = sweep.points_of(options(tmp_path, "objective.masking.clones=1,4"))
    for point, final in zip(points, (0.30, 0.34, 0.40, 0.42), strict=True):
        point.run_dir.mkdir(parents=True)
        records = [{"step": 0, "knn_accuracy": 0.2}, {"step": 25, "loss": 1 - final}]
        records += [{"step": 50, "knn_accuracy": final, "loss": 0.5}]
        (point.run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = sweep.collect(points, tmp_path)
    assert "| clones 1 | 2 | 50 | 32.0 ± 2.8 |" in text
    assert "| clones 4 | 2 | 50 | 41.0 ± 1.4 |" in text
    assert "- loss half-way and k-NN in the end: r = -1.00" in text
    assert "k-NN half-way" not in text  # it is the same for all runs
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_slurm_gets_a_line_for_every_run_that_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = options(tmp_path, "optim.lr=1e-3,2e-3", seeds=(1,))
    points = sweep.points_of(chosen)
    points[0].run_dir.mkdir(parents=True)
    write_status(points[0].run_dir, 0, "all steps done")
    assert sweep.submit(points, chosen) == 0
    lines = (tmp_path / "points.txt").read_text().splitlines()
    assert [shlex.split(line) for line in lines] == [list(points[1].arguments)]
    assert "--array=0-0%1" in capsys.readouterr().out


@pytest.mark.slow
def test_two_points_on_the_digits(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "sweep.py"), "demo_vision", "--grid", "objective.target.top_k_layers=1,3"]
    command += ["--out", "out", "--jobs", "2", "--", "--optim.max_steps=3", "--optim.warmup_steps=1"]
    command += ["--tracking.enabled=false", "--data.workers=0"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    for expected in ("2 runs, 0 of them finished before", "2 runs, 2 of them finished before"):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert expected in done.stdout
        assert "| top_k_layers 3 | 1 | 3 |" in done.stdout
