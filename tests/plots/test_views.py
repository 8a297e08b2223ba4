"""`d2v draw RUN --views`: which pictures there are, and what is said where there are none."""

from pathlib import Path

import pytest
import tiny_models
from concept_shards import joint_model, write_concepts, write_run
from PIL import Image

from d2v_scale.commands.draw import main


def drawn(run: Path) -> set[str]:
    return {path.name for path in (run / "plots").glob("*.png")}


def test_a_joint_run_is_looked_into_stem_by_stem_and_by_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_concepts(tmp_path / "set", 1, 8) / "test"
    run = write_run(tmp_path / "run", joint_model())
    assert main([str(run), "--views", "--data", str(shards), "--samples", "6"]) == 0
    assert capsys.readouterr().err == ""
    assert drawn(run) == {"occlusion_vision.png", "occlusion_speech.png", "separation.png"}
    for name in drawn(run):
        assert len(Image.open(run / "plots" / name).convert("L").getcolors(1 << 20) or []) > 50
    events = (run / "mlflow_events.jsonl").read_text()
    assert events.count('"artifact"') == 3
    assert main([str(run), "--views", "--data", str(shards), "--modality", "smell"]) == 2
    assert "has no stem 'smell'. Give one of vision, speech." in capsys.readouterr().err


def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_concepts(tmp_path / "set", 1, 4) / "test"
    run = write_run(tmp_path / "run", tiny_models.model("v1_vision"))
    assert main([str(run), "--views", "--data", str(shards)]) == 2
    assert "is a 1.0 encoder" in capsys.readouterr().err
    assert main([str(run), "--views"]) == 2
    assert "names no held-out shards. Give some with --data." in capsys.readouterr().err
    series = write_run(tmp_path / "series", tiny_models.model("v2_maps"))
    assert main([str(series), "--views", "--data", str(shards)]) == 2
    assert "holds no sample for the stem 'maps'" in capsys.readouterr().err
