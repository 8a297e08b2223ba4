"""`d2v_scale.train`, and the notebook that goes from a folder of pictures to neighbours with it."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import d2v_scale
from d2v_scale.errors import TrainingEnded, UserError
from d2v_scale.parallel import local_ranks
from d2v_scale.process.status import write_status

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "pictures_to_neighbours.ipynb"


Started = list[tuple[list[str], int, dict[str, str]]]


@pytest.fixture
def codes() -> list[int]:
    """What the next runs end with; 0 where it is empty."""
    return []


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codes: list[int]) -> Started:
    """What `train` would run, in an empty folder on a machine without GPUs: arguments and lines of a recipe's file,
    ranks, environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "DS_ACCELERATOR", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    calls: Started = []

    def run(command: list[str], ranks: int, environment: dict[str, str], *, share_cores: bool) -> int:
        del share_cores
        files = [Path(argument.removeprefix("--recipe=")) for argument in command if argument.startswith("--recipe=")]
        lines = [line for file in files if file.is_file() for line in file.read_text().splitlines()]
        calls.append(([*command[3:], *lines], ranks, environment))
        return codes.pop() if codes else 0

    monkeypatch.setattr(local_ranks, "run", run)
    monkeypatch.setattr(local_ranks, "count_gpus", lambda _: 0)
    return calls


def test_keys_are_nested_or_dotted(started: Started) -> None:
    Path("a b.tar").touch()
    run = d2v_scale.train(
        "demo_vision",
        data=Path("a b.tar"),
        run_dir="runs/a",
        ranks=2,
        optim={"lr": 1e-3, "betas": (0.9, 0.95)},
        evaluation={"train": None},
        **{"model.compile": True},
    )
    assert run == Path("runs/a")
    [(arguments, ranks, environment)] = started
    assert arguments == [
        *("--recipe=demo_vision", "--data=a b.tar", "--run_dir=runs/a", "--optim.lr=0.001"),
        *("--optim.betas=[0.9, 0.95]", "--evaluation.train=null", "--model.compile=true"),
    ]
    assert (ranks, environment["DS_ACCELERATOR"]) == (2, "cpu")


def test_a_notebook_that_was_open_for_long_is_no_start_up(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2V_SCALE_STARTED", "1.0")
    asked = time.time()
    d2v_scale.train("demo_vision", run_dir="runs/a")
    [(_, _, environment)] = started
    assert asked <= float(environment["D2V_SCALE_STARTED"]) <= time.time()


def test_a_recipe_from_python_is_a_file_for_the_run(started: Started) -> None:
    recipe = d2v_scale.Recipe(name="mine", seed=5)
    run = d2v_scale.train(recipe)
    assert run.parts[0] == "runs"
    assert run.name.startswith("mine-")
    [(arguments, ranks, _)] = started
    assert f"--run_dir={run}" in arguments
    assert "seed: 5" in arguments
    assert ranks == 1


def test_mistakes_are_errors_before_anything_is_started(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("demo_visoin",), {}, "Did you mean 'demo_vision'"),
        ((), {"optim": {"learning_rate": 1}}, r"optim\.learning_rate"),
        ((), {"optim": {"lr": "fast"}}, r"optim\.lr"),
        ((), {"ranks": 0}, "ranks is 0"),
        ((3,), {}, "recipe: is a int"),
        ((), {"print_config": True}, "print_config"),
    ]
    for arguments, overrides, says in calls:
        with pytest.raises(UserError, match=says):
            d2v_scale.train(*arguments, **overrides)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="launcher"):
        d2v_scale.train()
    monkeypatch.delenv("RANK")
    found: list[BaseException] = []

    def elsewhere() -> None:
        try:
            d2v_scale.train()
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(found[0])
    assert not started


@pytest.mark.parametrize(
    ("code", "kind"), [(2, UserError), (10, TrainingEnded), (12, TrainingEnded), (1, TrainingEnded)]
)
def test_exit_codes_are_errors(
    code: int, kind: type[Exception], started: Started, codes: list[int], tmp_path: Path
) -> None:
    codes.append(code)
    (tmp_path / "run").mkdir()
    write_status(tmp_path / "run", code, "the reason")
    with pytest.raises(kind, match="the reason") as error:
        d2v_scale.train(run_dir="run")
    if isinstance(error.value, TrainingEnded):
        assert (error.value.exit_code, error.value.run_dir) == (code, Path("run"))
        assert ("train(resume='run')" in str(error.value)) == (code == 10)


def test_the_name_is_callable_where_the_module_was_imported() -> None:
    """`import d2v_scale.train` puts the program's module in the place of the function."""
    says = "import d2v_scale, d2v_scale.train as m\nassert m is d2v_scale.train\nm('no_such_recipe')"
    done = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, timeout=120, check=False)
    assert "ConfigError: recipe: 'no_such_recipe' is neither" in done.stderr


def test_the_notebook_goes_from_pictures_to_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells in their order, with few pictures and steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.delenv("RANK", raising=False)
    rng = np.random.default_rng(0)
    for number in range(12):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24), dtype=np.uint8)).save(path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] for cell in cells)
    names: dict[str, Any] = {}
    for cell in cells:
        source = "".join(cell["source"]).replace("STEPS = 800", "STEPS = 2")
        exec(compile(source, NOTEBOOK.name, "exec"), names)  # as a kernel does
    assert names["STEPS"] == 2
    assert tuple(names["vectors"].shape) == (12, 96)
    assert tuple(names["neighbours"].shape) == (12, 5)
    assert (tmp_path / "neighbours" / "neighbours.png").is_file()


def test_shards_that_are_not_there_are_named_before_anything_is_started(started: Started) -> None:
    with pytest.raises(UserError, match=r"1 of 1 shards of 'nowhere\.tar' do not exist"):
        d2v_scale.train("demo_vision", data="nowhere.tar", run_dir="runs/a")
    assert started == []
    assert not Path("runs").exists()
