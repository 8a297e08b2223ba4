"""d2v_scale.run_files.recipe_paths: what a run directory keeps is found from any folder."""

from pathlib import Path

import pytest
from claimed_runs import claim
from claimed_runs import unlocked as unlocked

from d2v_scale.command_line import changed_from_named, parse
from d2v_scale.recipe import to_dict
from d2v_scale.run_files.recipe_file import dump
from d2v_scale.run_files.recipe_paths import make_absolute


def test_every_relative_path_becomes_absolute_and_what_is_none_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    elsewhere = ["pipe:cat a.tar", "s3://bucket/{000..003}.tar", "/data/[v1]/x.tar"]
    relative = ["a", "./a b/ü.tar", "../a", "in1k-{000..003}.tar", "*.tar", "a#b?.tar"]
    for given in [*elsewhere, *relative]:
        recipe, _ = parse(["--data", given, "--evaluation.train", given, "--deepspeed_config", "zero.json"])
        recipe.data.sources[0].index, recipe.data.cache_dir = "i.index.json", None
        recipe.data.text.tokenizer = "spm.model"
        make_absolute(recipe, only_found=False)
        expected = given if given in elsewhere else str(tmp_path / given)
        assert recipe.data.sources[0].shards == recipe.evaluation.train == expected
        assert (recipe.data.sources[0].index, recipe.data.cache_dir) == (str(tmp_path / "i.index.json"), None)
        assert recipe.data.text.tokenizer == str(tmp_path / "spm.model")
        assert recipe.deepspeed_config == str(tmp_path / "zero.json")


def test_a_run_directory_keeps_absolute_paths_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("spm.model", "x.tar"):
        (tmp_path / name).write_text("")
    run_dir = tmp_path / "run"
    given = ["--data", "x.tar", "--data.text.tokenizer", "spm.model"]
    claim(run_dir, *given)
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    claim(run_dir, *given)
    monkeypatch.chdir("/")
    claim(run_dir, "--resume", str(run_dir))
    recipe, _ = parse(["--resume", str(run_dir)])
    assert (recipe.data.sources[0].shards, recipe.data.text.tokenizer) == (
        str(tmp_path / "x.tar"),
        str(tmp_path / "spm.model"),
    )
    assert not (run_dir / "recipe_changes.jsonl").exists()


def test_an_older_run_directory_with_relative_paths_is_still_resumed_where_they_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("spm.model", "x.tar"):
        (tmp_path / name).write_text("")
    run_dir = tmp_path / "run"
    given = ["--data", "x.tar", "--data.text.tokenizer", "spm.model"]
    claim(run_dir, *given)
    (run_dir / "recipe.yaml").write_text(dump(parse(given)[0]))
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    # An attempt in another folder finds nothing there and breaks nothing.
    monkeypatch.chdir("/")
    claim(run_dir, "--resume", str(run_dir))
    assert parse(["--resume", str(run_dir)])[0].data.sources[0].shards == "x.tar"
    # Where they lead, and by the first command.
    monkeypatch.chdir(tmp_path)
    claim(run_dir, *given)
    claim(run_dir, "--resume", str(run_dir))
    assert parse(["--resume", str(run_dir)])[0].data.sources[0].shards == str(tmp_path / "x.tar")


def test_a_packaged_recipe_does_not_differ_from_itself_by_where_it_runs() -> None:
    recipe, _ = parse(["--recipe", "demo_vision"])
    before = to_dict(recipe)
    assert changed_from_named(recipe) == {}
    assert to_dict(recipe) == before
    make_absolute(recipe, only_found=False)
    assert changed_from_named(recipe) == {}
