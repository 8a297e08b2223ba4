"""Templates laid out in a folder, and how the packaged ones are found."""

from pathlib import Path

import pytest

from d2v_scale import templates
from d2v_scale.commands import lay_out_templates
from d2v_scale.errors import ConfigError
from d2v_scale.parallel import ds_config
from d2v_scale.recipe import Recipe
from d2v_scale.run_files.recipe_paths import make_absolute

ROOT = Path(__file__).resolve().parents[2]


def test_all_is_laid_out_and_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "a" / "mine"
    assert lay_out_templates.main([str(target), "--recipes"]) == 0
    for name, folder in (("slurm", ROOT / "slurm"), ("ds_configs", ROOT / "ds_configs")):
        ours = {path.name for path in folder.iterdir()} - {"site.env"}
        assert {path.name for path in (target / name).iterdir()} == ours
    assert (target / "recipes" / "demo_vision.yaml").is_file()
    assert (target / "slurm" / "site.env.example").is_file()
    (target / "slurm" / "lib.sh").write_text("mine\n")
    capsys.readouterr()
    assert lay_out_templates.main([str(target)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (target / "slurm" / "lib.sh").read_text() == "mine\n"


def test_one_folder_that_is_there_stops_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slurm").mkdir()
    assert lay_out_templates.main([str(tmp_path)]) == 2
    assert str(tmp_path / "slurm") in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["slurm"]
    (tmp_path / "file").touch()
    assert lay_out_templates.main([str(tmp_path / "file")]) == 2
    assert "error: " in capsys.readouterr().err


def test_a_packaged_deepspeed_json_is_found_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ds_configs/zero2.json`, as papers and plans write it, was found in a clone's own folder only."""
    monkeypatch.chdir(tmp_path)
    name = "ds_configs/zero2.json"
    assert ds_config.read(name) == ds_config.read(templates.folder("ds_configs") / "zero2.json")
    recipe = Recipe(deepspeed_config=name)
    make_absolute(recipe, only_found=False)
    assert recipe.deepspeed_config == str(templates.folder("ds_configs") / "zero2.json")
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / name).write_text('{"zero_optimization": {"stage": 1}}')
    assert ds_config.read(name) == {"zero_optimization": {"stage": 1}}, "what is in this folder counts first"
    with pytest.raises(ConfigError, match="cannot read"):
        ds_config.read("ds_configs/none.json")
    with pytest.raises(ConfigError, match="cannot read zero2"):
        ds_config.read("zero2.json")
