"""Sweeps: every combination once, mistakes before anything runs, the table is read from the records."""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_scale.command_line import parse
from d2v_scale.commands import sweep
from d2v_scale.errors import ConfigError, UserError
from d2v_scale.process.status import write_status
from d2v_scale.recipe import Recipe

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def options(
    out: Path, *grid: str, seeds: tuple[int, ...] | None = (1, 2), equal_compute: bool = False
) -> argparse.Namespace:
    return argparse.Namespace(
        recipe="tiny2_vision",
        grid=list(grid),
        seeds=None if seeds is None else list(seeds),
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


def test_a_dry_run_runs_nothing_without_slurm_too(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trained every point."""
    monkeypatch.setattr(sweep, "run_local", lambda *_: pytest.fail("it ran"))
    arguments = ["tiny2_vision", "--grid", " optim.lr = 1e-3, 2e-3", "--out", str(tmp_path / "out"), "--dry_run"]
    assert sweep.main([*arguments, "--", "--data=https://h/a.tar?sig=pl4ntedS3cret"]) == 0
    printed = capsys.readouterr().out
    assert [line.count("--optim.lr=") for line in printed.splitlines()] == [1, 1]
    assert "pl4ntedS3cret" not in printed


def test_no_secret_is_in_the_list_of_a_submission(tmp_path: Path) -> None:
    chosen = options(tmp_path, "optim.lr=1e-3,2e-3", seeds=(1,))
    chosen.training = ["--data=https://h/a.tar?sig=pl4ntedS3cret"]
    with pytest.raises(UserError, match=r"\$NAME") as caught:
        sweep.submit(sweep.points_of(chosen), chosen)
    assert "pl4ntedS3cret" not in str(caught.value)
    assert not list(tmp_path.glob("points*"))
    chosen.training = ["--data=https://h/a.tar?sig=$SIGNATURE"]
    assert sweep.submit(sweep.points_of(chosen), chosen) == 0


def test_equal_compute_gives_more_masks_fewer_steps(tmp_path: Path) -> None:
    few, many = sweep.points_of(
        options(tmp_path, "objective.masking.clones=1,8", seeds=(1,), equal_compute=True)
    )  # fmt: skip

    def steps(point: sweep.Point) -> int:
        (given,) = [a for a in point.arguments if a.startswith("--optim.max_steps=")]
        return int(given.partition("=")[2])

    assert steps(few) > parse(["--recipe=tiny2_vision"])[0].optim.max_steps > steps(many)


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
    assert "of settings" not in text  # there are two
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_joint_runs_had_empty_columns(tmp_path: Path) -> None:
    """What is recorded by stem is shown by stem; k-NN in plot and signs is the mean of all."""
    points = sweep.points_of(options(tmp_path, "objective.masking.clones=1,4"))
    for point, final in zip(points, (0.30, 0.34, 0.40, 0.42), strict=True):
        point.run_dir.mkdir(parents=True)
        records = [{"step": 25, "loss": 1 - final}]
        records += [{"step": 50, "knn_accuracy/vision": final, "knn_accuracy/text": 0.5, "loss": 0.5}]
        (point.run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = sweep.collect(points, tmp_path)
    assert "| | runs | steps | k-NN, vision | k-NN, text | held-out" in text
    assert "| clones 1 | 2 | 50 | 32.0 ± 2.8 | 50.0 ± 0.0 |" in text
    assert "- loss half-way and k-NN in the end: r = -1.00" in text


def test_a_sign_is_said_to_pick_a_setting_and_how_far_behind_the_best_that_ends(tmp_path: Path) -> None:
    points = sweep.points_of(options(tmp_path, "objective.masking.clones=1,4,8"))
    for point, final in zip(points, (0.30, 0.34, 0.40, 0.42, 0.38, 0.38), strict=True):
        point.run_dir.mkdir(parents=True)
        at_half = {"knn_accuracy": final / 2, "held_out_loss": 1 - final, "rankme": 9 - 10 * final, "lidar": 1.0}
        records = [{"step": 0, "knn_accuracy": 0.2}, {"step": 25, **at_half}]
        records += [{"step": 50, "knn_accuracy": final, "rankme": 3 - point.seed, "lidar": final}]
        (point.run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = sweep.collect(points, tmp_path).splitlines()
    told = {line.partition(" and k-NN")[0]: line.partition("of settings: ")[2] for line in lines if line[:2] == "- "}
    best = "rank correlation +1.00, picks clones 4, 0.0 points behind"
    assert told["- k-NN half-way"] == told["- LiDAR in the end"] == best
    assert told["- held-out loss half-way"] == "rank correlation -1.00, picks clones 4, 0.0 points behind"
    assert told["- RankMe half-way"] == "rank correlation -1.00, picks clones 1, 9.0 points behind"
    assert told["- RankMe in the end"] == ""  # the same of all settings
    assert "- LiDAR half-way" not in told  # the same in all runs
    assert "- k-NN in the end" not in told


def test_slurm_gets_a_line_for_every_run_that_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = options(tmp_path, "optim.lr=1e-3,2e-3", seeds=(1,))
    points = sweep.points_of(chosen)
    points[0].run_dir.mkdir(parents=True)
    write_status(points[0].run_dir, 0, "all steps done")
    assert sweep.submit(points, chosen) == 0
    lines = (tmp_path / "points.txt").read_text().splitlines()
    assert [shlex.split(line) for line in lines] == [list(points[1].arguments)]
    assert "--array=0-0%1" in capsys.readouterr().out


def trained(point: sweep.Point) -> Recipe:
    """The recipe that a task of this point runs."""
    return parse(list(point.arguments))[0]


def submitted(out: Path, capsys: pytest.CaptureFixture[str], *grid: str, **more) -> tuple[Path, list[list[str]], str]:
    """The list that an array's tasks are told to read, what stands in it, and what was said."""
    out.mkdir(exist_ok=True)
    chosen = options(out, *grid, **more)
    assert sweep.submit(sweep.points_of(chosen), chosen) == 0
    printed = capsys.readouterr()
    (told,) = [word for word in printed.out.split() if word.startswith("--export=")]
    listing = Path(told.partition("D2V_SCALE_SWEEP=")[2])
    return listing, [shlex.split(line) for line in listing.read_text().splitlines()], printed.err


def test_a_grid_over_seed_trains_each_seed_under_its_own_label(tmp_path: Path) -> None:
    """Every point trained seed 1."""
    points = sweep.points_of(options(tmp_path, "seed=1,2,3", seeds=None))
    assert [(point.seed, trained(point).seed, point.label) for point in points] == [
        (seed, seed, f"seed {seed}") for seed in (1, 2, 3)
    ]
    joined = sweep.points_of(options(tmp_path, "seed+optim.lr=4+1e-3,5+2e-3", seeds=None))
    assert [(trained(point).seed, trained(point).optim.lr) for point in joined] == [(4, 1e-3), (5, 2e-3)]


@pytest.mark.parametrize(
    ("grid", "seeds", "training", "says"),
    [
        (["seed=1,2"], (1,), [], "--grid seed= and --seeds both give seeds"),
        (["seed=1,2"], None, ["--seed=3"], "--grid seed= and --seed both"),
        ([], (1,), ["--seed", "3"], "--seeds and --seed both"),
        (["optim.lr=1,2", "optim.lr=3"], None, [], "optim.lr on two axes"),
        (["run_dir=a,b"], None, [], "directory of its own"),
        ([], None, ["--run_dir=a"], "directory of its own"),
    ],
)
def test_what_is_given_twice_is_refused(
    tmp_path: Path, grid: list[str], seeds: tuple[int, ...] | None, training: list[str], says: str
) -> None:
    chosen = options(tmp_path, *grid, seeds=seeds)
    chosen.training += training
    with pytest.raises(UserError, match=says):
        sweep.points_of(chosen)


def test_a_seed_among_the_training_arguments_counts(tmp_path: Path) -> None:
    chosen = options(tmp_path, seeds=None)
    chosen.training += ["--seed", "7"]
    assert [trained(point).seed for point in sweep.points_of(chosen)] == [7]


def test_a_later_submission_leaves_the_list_of_an_earlier_one_alone(tmp_path: Path, capsys) -> None:
    """Queued and requeued tasks of the first array read other points than they were submitted for."""
    first, points, said = submitted(tmp_path, capsys, "optim.lr=1e-3,2e-3", seeds=(1,))
    assert "too, and not finished" not in said
    run_dir = Path(points[0][-1].partition("=")[2])
    run_dir.mkdir(parents=True)
    write_status(run_dir, 0, "all steps done")
    second, later, said = submitted(tmp_path, capsys, "optim.lr=1e-3,2e-3", seeds=(1, 2))
    assert second != first
    assert [shlex.split(line) for line in first.read_text().splitlines()] == points
    assert len(later) == 3
    assert f"1 of these points are in {first}" in said
    assert submitted(tmp_path, capsys, "optim.lr=1e-3,2e-3", seeds=(1, 2))[0] == second, "the same again needs no other"


def test_lists_can_be_swept(tmp_path: Path, capsys) -> None:
    points = sweep.points_of(options(tmp_path, "optim.betas=[0.9,0.98],[0.9, 0.95]", seeds=(1,)))
    assert [trained(point).optim.betas for point in points] == [(0.9, 0.98), (0.9, 0.95)]
    assert len({point.label for point in points}) == 2
    both = sweep.points_of(options(tmp_path, "optim.betas+optim.lr=[0.9,0.98]+1,[0.8,0.95]+'1e+2'"))
    assert [trained(point).optim.lr for point in both[::2]] == [1, 100]


VALUES = {
    "a b": "a b",
    '"a, b"': "a, b",
    "'\"q\"'": '"q"',
    "it's": "it's",
    "a=b": "a=b",
    "1e+3": "1e+3",
    "$HOME `ls`;a|b&": "$HOME `ls`;a|b&",
    "/a/{x,y}/*.tar": "/a/{x,y}/*.tar",
    "'['": "[",
    '""': "",
    "ü": "ü",
    # Alike in a file name:
    "a/b": "a/b",
    "a_b": "a_b",
    "x" * 300: "x" * 300,
    "x" * 301: "x" * 301,
}
"""On the command line, and in the recipe."""


def test_a_value_arrives_at_the_task_as_it_was_given(tmp_path: Path, capsys) -> None:
    """Through the axis, the list, the batch shell's reading of it and train.py; with its own directory and label."""
    chosen = options(tmp_path, f"name={','.join(VALUES)}", seeds=(1,))
    points = sweep.points_of(chosen)
    assert [trained(point).name for point in points] == [*VALUES.values()]
    assert len({point.label for point in points}) == len({point.run_dir for point in points}) == len(VALUES)
    library = (TOOLS.parent / "slurm/lib.sh").read_text()
    read = library[library.index("read_point()") :]
    read = read[: read.index("\n}\n") + 3]
    script = f'die() {{ exit 2; }}\n{read}\nread_point && printf "%s\\0" "${{point[@]}}"'
    listing = sweep.own_list(tmp_path, points)
    for number, point in enumerate(points):
        environment = os.environ | {"D2V_SCALE_SWEEP": str(listing), "SLURM_ARRAY_TASK_ID": str(number)}
        got = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
        assert tuple(got.split("\0")[:-1]) == point.arguments
        assert point.run_dir.parent == (tmp_path / "runs").resolve()
        point.run_dir.mkdir(parents=True)
        (point.run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "knn_accuracy": 0.5}\n')
    table = sweep.collect(points, tmp_path).splitlines()
    assert len([line for line in table if "| 1 | 1 |" in line]) == len(VALUES)


def test_the_same_point_twice_runs_once(tmp_path: Path, capsys) -> None:
    points = sweep.points_of(options(tmp_path, "optim.lr=1e-3,0.001,2e-3,1e-3", seeds=(1, 1)))
    assert [trained(point).optim.lr for point in points] == [1e-3, 2e-3]
    assert "lr 0.001 is lr 1e-3, seed 1: it runs once" in capsys.readouterr().err


@pytest.mark.parametrize("axis", ["optim.betas=[0.9,0.98", "name=a]", "name='a", "name=(a"])
def test_half_a_bracket_is_refused(axis: str) -> None:
    with pytest.raises(UserError, match="other half"):
        sweep.axis_of(axis)


def test_what_a_list_or_sbatch_cannot_take_is_refused(tmp_path: Path) -> None:
    for out, axis in ((tmp_path / "a,b", "optim.lr=1,2"), (tmp_path / "out", "name=a\nb")):
        out.mkdir()
        chosen = options(out, axis)
        with pytest.raises(UserError, match=r"comma|several lines"):
            sweep.submit(sweep.points_of(chosen), chosen)


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


def test_runs_that_are_compared_compute_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measured for itself whether bf16 is faster, so that seeds of one point could differ in precision."""
    monkeypatch.delenv("D2V_SCALE_MEASURE")
    seen: list[str] = []
    monkeypatch.setattr(sweep, "run_quietly", lambda *_, env: seen.append(env["D2V_SCALE_MEASURE"]))
    points = [sweep.Point((), 1, (), tmp_path)]
    sweep.run_local(points, 1)
    monkeypatch.setenv("D2V_SCALE_MEASURE", "1")
    sweep.run_local(points, 1)
    assert seen == ["0", "1"]
