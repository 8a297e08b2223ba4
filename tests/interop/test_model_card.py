"""The model card of an export: what it says, and that its lines run."""

import json
import re
import warnings
from pathlib import Path

import pytest
import tiny_models
import yaml
from exported_models import checkpoint_of, tool, tuned

from d2v_scale.data.config import SourceConfig
from d2v_scale.finetuning.config import CtcConfig, TaskConfig
from d2v_scale.interop import model_card
from d2v_scale.modalities.text import tokenizer_training
from d2v_scale.model.stem_config import TextStem
from d2v_scale.recipe import Recipe

warnings.filterwarnings("ignore")
CTC = TaskConfig(kind="ctc", ctc=CtcConfig(letters="abc"))


@pytest.fixture(autouse=True)
def _world(world_of_one: None) -> None:
    pass


def program_of(folder: Path) -> str:
    [program] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return str(program)


@pytest.mark.parametrize(
    ("name", "task", "printed"),
    [
        *[(name, None, "32])") for name in (*tiny_models.NAMES, *tiny_models.ARRAYS)],
        ("v2_maps", TaskConfig(classes=3), "[1, 3])"),
        ("v2_speech", CTC, "8])"),
        ("v1_speech", CTC, "8])"),
        ("v2_vision", TaskConfig(classes=3), "[1, 3])"),
        ("v1_text", TaskConfig(classes=3), "[1, 3])"),
    ],
)
def test_the_lines_of_a_card_run_in_its_folder(
    name: str,
    task: TaskConfig | None,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = checkpoint_of(name, tmp_path) if task is None else tuned(name, task, tmp_path), tmp_path / "hf"
    assert tool("export").main([str(run), str(out), "--license", "apache-2.0"]) == 0
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "transformers"
    assert name.split("_")[1] in front["tags"]
    assert f"| recipe | {name} |" in card
    program = program_of(out)
    assert ("trust_remote_code" in program) == (name in ("v2_speech", "v2_vision", *tiny_models.ARRAYS))
    assert len(program.splitlines()) <= 12
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(program, {})
    assert capsys.readouterr().out.strip().endswith(printed)


def test_the_lines_of_a_text_with_its_tokenizer_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "tokenizer.model"
    tokenizer_training.train(["some words to count, and some more of them"] * 20, model, vocab_size=290)
    monkeypatch.setattr(tiny_models, "text", lambda: TextStem(vocab_size=291, max_positions=24, mask_id=290))
    out = tmp_path / "hf"
    assert tool("export").main([str(checkpoint_of("v1_text", tmp_path)), str(out), "--tokenizer", str(model)]) == 0
    assert "AutoTokenizer" in program_of(out)
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(program_of(out), {})
    assert capsys.readouterr().out.strip().endswith("32])")


def test_scores_are_those_of_the_run_up_to_the_checkpoint(tmp_path: Path) -> None:
    run, out = checkpoint_of("v1_vision", tmp_path), tmp_path / "plain"
    common = {"samples": 8, "time": 1.0, "hours": 0.1}
    lines = [
        {"step": 0, **common, "loss": 2.5, "lr": 0.1},
        {"step": 0, **common, "knn_accuracy": 0.625, "test/accuracy": 0.75},
        {"step": 4, **common, "loss": 1.5, "knn_accuracy": float("nan")},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tool("export").main([str(run), str(out), "--to", "safetensors"]) == 0
    card = (out / "README.md").read_text()
    assert "license: unknown" in card
    for row in ("| loss | 2.5 | 0 |", "| knn_accuracy | 0.625 | 0 |", "| test/accuracy | 0.75 | 0 |"):
        assert row in card
    assert "lr" not in card.split("## Scores")[1].split("## Loading")[0]
    assert "load_encoder" in program_of(out)


@pytest.mark.parametrize(
    ("name", "to", "printed"),
    [
        ("v1_vision", "safetensors", "['vision'] 3 32"),
        ("v1_vision", "fairseq", "data2vec_vision checkpoint"),
        ("v2_speech", "fairseq", "fairseq checkpoint"),
    ],
)
def test_the_lines_of_other_targets_run(
    name: str,
    to: str,
    printed: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = checkpoint_of(name, tmp_path), tmp_path / "out"
    assert tool("export").main([str(run), str(out), "--to", to, "--license", "mit", "--half"]) == 0
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    whose = "the student's and the teacher's" if to == "fairseq" else "the teacher's"
    assert f"| weights | {whose}, stored in float16 |" in card
    monkeypatch.chdir(out)
    capsys.readouterr()
    exec(program_of(out), {})
    assert capsys.readouterr().out.startswith(printed)


def test_a_card_that_people_wrote_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = checkpoint_of("v1_vision", tmp_path), tmp_path / "hf"
    for _ in range(2):
        assert tool("export").main([str(run), str(out)]) == 0
    (out / "README.md").write_text("# Ours\n")
    assert tool("export").main([str(run), str(out)]) == 0
    assert (out / "README.md").read_text() == "# Ours\n"
    assert "stays as it is" in capsys.readouterr().out


def test_a_card_names_data_without_where_it_lies() -> None:
    recipe = Recipe(name="x", model=tiny_models.model("v1_vision"))
    recipe.data.sources = [
        SourceConfig(modality="vision", shards="/home/someone/in1k-{000..010}.tar"),
        SourceConfig(modality="vision", shards="pipe:curl -H 'token: secret' https://host/a.tar"),
        SourceConfig(modality="vision", shards="s3://key:secret@bucket/a.tar", name="more"),
    ]
    assert model_card._data(recipe) == "vision (in1k-{000..010}.tar), vision, vision (more)"


def test_a_license_that_no_card_would_hold_is_refused(tmp_path: Path) -> None:
    run = checkpoint_of("v1_vision", tmp_path)
    for more in (["--license", " "], ["--license", "a: b"]):
        with pytest.raises(SystemExit):
            tool("export").main([str(run), str(tmp_path / "out"), *more])
