"""Raw files where shards belong: the exact command, or shards beside the run."""

import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_shards import images_folder

from d2v_scale.command_line import parse
from d2v_scale.commands import make_shards
from d2v_scale.data.config import SourceConfig
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.recipe import Recipe
from d2v_scale.run_files import raw_data
from d2v_scale.run_files.raw_data import prepare, shards_or_command
from d2v_scale.run_files.recipe_paths import find_data
from d2v_scale.running.preflight import local_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return images_folder(tmp_path / "pictures")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """`d2v shards` without a process of its own; returns its calls."""
    calls: list[list[str]] = []

    class Done:
        def __init__(self, command: list[str]) -> None:
            calls.append(command)
            arguments = command[command.index("shards") + 1 :]
            self.returncode = make_shards.main([*arguments, "--processes", "1"])

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(raw_data.subprocess, "Popen", Done)
    return calls


def recipe_of(source: Path, name: str = "tiny2_vision") -> Recipe:
    return parse(["--recipe", name, "--data", str(source)])[0]


def test_the_command_that_is_named_makes_shards_that_are_found(folder: Path) -> None:
    with pytest.raises(DataError, match="holds no shards, but 12 images in 2 folders") as caught:
        find_data(recipe_of(folder), rank=0)
    named = str(caught.value).split("`")[1]
    assert local_shards(str(folder)) == ([], str(caught.value))
    assert make_shards.main([*shlex.split(named)[2:], "--processes", "1"]) == 0
    index = str(caught.value).partition("--data ")[2].partition(":")[0]
    assert int(shards_or_command(SourceConfig(shards=index)).samples_s.sum()) == 12


def test_shards_are_made_beside_the_run_once_and_found_again(folder: Path, in_this_process: list) -> None:
    run_dir = folder.parent / "runs" / "a"
    recipes = [recipe_of(folder) for _ in range(3)]
    with ThreadPoolExecutor(1) as pool:
        list(pool.map(lambda recipe: prepare(recipe, str(run_dir), lambda: False), recipes))
    found = {recipe.data.sources[0].shards for recipe in recipes}
    [index] = found
    assert Path(index).parents[2] == run_dir.parent
    find_data(recipes[0], rank=0)
    tars = {path: path.stat().st_mtime_ns for path in Path(index).parent.glob("*.tar")}
    assert tars
    prepare(recipes[0], str(run_dir), lambda: False)  # it has its shards
    assert len(in_this_process) == 3
    assert tars == {path: path.stat().st_mtime_ns for path in Path(index).parent.glob("*.tar")}


def test_ranks_that_waited_do_not_look_again(folder: Path, in_this_process: list, monkeypatch) -> None:
    """What another rank made since this one asked is as new as anything."""
    began = time.time() - 60
    recipe = recipe_of(folder)
    prepare(recipe, str(folder.parent / "runs" / "a"), lambda: False)
    monkeypatch.setattr(raw_data.time, "time", lambda: began)
    other = recipe_of(folder)
    prepare(other, str(folder.parent / "runs" / "a"), lambda: False)
    assert other.data.sources[0].shards == recipe.data.sources[0].shards
    assert len(in_this_process) == 1


def test_what_the_stem_cannot_read_is_refused_before_anything_is_made(folder: Path, in_this_process: list) -> None:
    with pytest.raises(ConfigError, match=r"12 images in 2 folders.*but the stem 'speech' reads recordings"):
        prepare(recipe_of(folder, "tiny2_speech"), None, lambda: False)
    assert not in_this_process


def test_several_nodes_make_their_shards_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"several nodes.*slurm/make_shards.sh"):
        prepare(recipe_of(folder), None, lambda: False)


def test_a_source_that_is_nothing_is_told_as_ever(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No shard matches|do not exist"):
        shards_or_command(SourceConfig(shards=str(tmp_path / "absent.tar")))


@pytest.mark.slow
def test_two_ranks_prepare_once_and_train(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    command = [
        sys.executable,
        "-m",
        "d2v_scale",
        "train",
        "--ranks",
        "2",
        "--recipe",
        "tiny2_vision",
        "--prepare",
        "true",
    ]
    command += ["--data", str(folder), "--run_dir", str(folder.parent / "runs" / "a"), "--stop_at", "2"]
    command += ["--global_batch_size", "4", "--evaluation.train", "null", "--tracking.enabled", "false"]
    done = subprocess.run([*command, "--data.workers", "0"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("making shards of") == 1
    [index] = (folder.parent / "runs" / "shards").glob("*/train.index.json")
    assert str(index) in (folder.parent / "runs" / "a" / "recipe.yaml").read_text()
