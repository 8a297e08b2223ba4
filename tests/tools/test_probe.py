"""tools/probe.py on runs, exported folders and fine-tuned models."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from small_shards import image_samples, sound_samples

from d2v_scale.batch import Batch
from d2v_scale.checkpoint import write_single
from d2v_scale.data2vec.config import ObjectiveConfig
from d2v_scale.evaluation.frozen import FrozenEncoder
from d2v_scale.finetuning.config import CtcConfig, TaskConfig
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.modalities.speech.decoder import measure
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.init import initialize
from d2v_scale.networks.stack import Student
from d2v_scale.plots import of_run
from d2v_scale.recipe import Recipe, to_dict
from d2v_scale.shards.writing import write_set
from d2v_scale.teacher.config import TeacherConfig

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, world_of_one: None) -> Run:
    """Runs a tool's `main` in this process; returns its exit code."""

    def call(tool: str, *arguments: object) -> int:
        return importlib.import_module(f"d2v_scale.commands.{tool}").main([*map(str, arguments)])

    return call


def checkpoint(
    path: Path,
    name: str,
    task: TaskConfig | None = None,
    model: ModelConfig | None = None,
    teacher: TeacherConfig | None = None,
) -> Path:
    recipe = Recipe(
        teacher=teacher or TeacherConfig(),
        name=name,
        model=model or tiny_models.model(name),
        task=task,
        objective=ObjectiveConfig(target=tiny_models.target_of(name)),
    )
    module: torch.nn.Module = Student(recipe.model) if task is None else TaskModel(recipe.model, task)
    initialize(module, 1)
    tensors = {n: p.detach() for n, p in module.named_parameters()}
    extra = {"recipe": json.loads(json.dumps(to_dict(recipe)))}
    write_single(path / "checkpoints", tensors, tensors if task is None else None, extra)
    (path / "metrics.jsonl").write_text("")
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    write_set(tmp_path / "images", "train", "image", image_samples(24, side=16), per_shard=30, classes=["a", "b", "c"])
    return tmp_path / "images"


@pytest.mark.parametrize("name", ["v1_vision", "v2_vision", "v2_vision_wide"])
def test_an_exported_folder_scores_as_the_run_it_is_from_and_is_recorded_there(
    name: str, run: Run, images: Path, tmp_path: Path
) -> None:
    made = checkpoint(tmp_path / "run", name)
    scores = []
    export = importlib.import_module("d2v_scale.commands.export").main
    assert export([str(made), str(tmp_path / "hf")]) == 0
    assert export([str(made), str(tmp_path / "plain"), "--to", "safetensors"]) == 0
    for source in (made, tmp_path / "hf", tmp_path / "plain"):
        out = tmp_path / "result.json"
        assert run("probe", source, "--data", images, "--test", images, "--k", 3, "--out", out) == 0
        scores.append(json.loads(out.read_text())["accuracy"])
    assert scores[0] == scores[1] == scores[2]
    if name.startswith("v1_vision"):
        # As somebody else's weights: nothing but what transformers writes.
        (tmp_path / "hf" / "d2v_scale.json").unlink()
        foreign = ["--data", images, "--test", images, "--k", 3, "--out", tmp_path / "result.json"]
        assert run("probe", tmp_path / "hf", *foreign) == 0
        assert json.loads((tmp_path / "result.json").read_text())["accuracy"] == scores[0]
    events = (made / "mlflow_events.jsonl").read_text().splitlines()
    assert [json.loads(event)["event"] for event in events] == ["evaluation"] * 3


def test_attentive_and_a_classifiers_own_answers(
    run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = ["--data", images, "--test", images, "--batch_size", 6]
    plain, tuned = (
        checkpoint(tmp_path / "a", "v1_vision"),
        checkpoint(tmp_path / "b", "v1_vision", TaskConfig(classes=3)),
    )
    assert run("probe", plain, *shards, "--task", "attentive") == 0
    assert "attentive pooling" in capsys.readouterr().out
    assert run("probe", tuned, *shards, "--task", "classify") == 0
    assert "accuracy" in capsys.readouterr().out
    assert run("probe", plain, *shards, "--task", "classify") == 2
    assert "no classifier" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["knn", "linear", "attentive"])
def test_features_that_are_not_finite_are_refused_with_the_run_and_the_samples(
    task: str,
    run: Run,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whitening them ended in a traceback of the decomposition."""
    made = checkpoint(tmp_path / "run", "v1_vision")
    whole = FrozenEncoder.hidden_states

    def diverged(self: FrozenEncoder, batch: Batch, layers: list[int] | None = None) -> list[torch.Tensor]:
        found = whole(self, batch, layers)
        found[-1][1] = float("nan")
        return found

    monkeypatch.setattr(FrozenEncoder, "hidden_states", diverged)
    assert run("probe", made, "--data", images, "--test", images, "--task", task, "--batch_size", 6) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {made}")
    assert ": features are not finite of 1 samples in 6, the first: image-" in said


def test_numbers_that_measure_nothing_are_refused(
    run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--k 0 printed the share of the first class as every layer's score; a limit of 1 ended in a traceback."""
    made = checkpoint(tmp_path / "run", "v1_vision")
    call = [made, "--data", images, "--test", images]
    for option in ("--k", "--limit", "--batch_size"):
        assert run("probe", *call, option, 0) == 2
        assert f"{option} is 0. Give at least 1." in capsys.readouterr().err
    assert run("probe", *call, "--task", "linear", "--limit", 3) == 2
    assert "cannot be fitted to 3 samples" in capsys.readouterr().err


def test_ctc_on_frozen_features_and_with_a_models_own_head(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "speech"
    samples = [sample | {"txt": ["ab", "ba"][k % 2]} for k, sample in enumerate(sound_samples(12))]
    write_set(shards, "train", "recording", samples, per_shard=20, measure=measure)
    task = TaskConfig(kind="ctc", ctc=CtcConfig(letters="ab"))
    for made in (checkpoint(tmp_path / "a", "v1_speech"), checkpoint(tmp_path / "b", "v2_speech", task)):
        call = [made, "--data", shards, "--test", shards, "--task", "ctc", "--letters", "ab", "--beam", 3]
        assert run("probe", *call, "--out", tmp_path / "result.json") == 0
        assert json.loads((tmp_path / "result.json").read_text())["error"].keys() == {"wer", "cer"}
    assert "wer" in capsys.readouterr().out


def test_one_of_several_modalities_is_chosen_not_the_first_taken(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(of_run, "draw_gallery", lambda _, g: drawn.append(g.batch.modality) or [])
    model = tiny_models.model("v2_vision")
    model.speech, model.backbone.prenet_depth = tiny_models.speech(alibi=True), 1
    model.predictor.kind = "conv"
    made = checkpoint(tmp_path / "run", "v2_vision", model=model)
    sounds = tmp_path / "speech"
    write_set(sounds, "train", "recording", sound_samples(12), per_shard=20, measure=measure)
    for modality, shards in (("vision", images), ("speech", sounds)):
        sets = ["--data", shards, "--test", shards, "--k", 3]
        assert run("probe", made, *sets) == 2
        assert "Choose one with --modality" in capsys.readouterr().err
        assert run("probe", made, *sets, "--modality", modality) == 0
        assert run("draw", made, "--data", shards, "--samples", 6) == 0
        [other] = {"vision", "speech"} - {modality}
        assert f"not drawn: {other}: " in capsys.readouterr().err
        assert run("draw", made, "--data", shards, "--modality", modality, "--samples", 6) == 0
    assert drawn == ["vision", "vision", "speech", "speech"]


def test_pictures_of_a_run_whose_teacher_does_not_follow_are_of_its_student_alone(
    images: Path, tmp_path: Path, world_of_one: None
) -> None:
    made = checkpoint(tmp_path / "run", "v2_vision", teacher=TeacherConfig(kind="frozen"))
    gallery = of_run._gallery(FrozenEncoder.load(made), FrozenEncoder.load(made, "student"), "vision", str(images), 6)
    assert gallery.encoder == "student"
    assert gallery.student_lnd is None


def test_a_models_own_beam_is_kept_unless_another_is_given(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = tmp_path / "speech"
    write_set(
        shards, "train", "recording", [s | {"txt": "ab"} for s in sound_samples(4)], per_shard=20, measure=measure
    )
    made = checkpoint(tmp_path / "a", "v1_speech", TaskConfig(kind="ctc", ctc=CtcConfig(letters="ab", beam=3)))
    widths = []

    def note(frames_tc: object, beam: int) -> list[int]:
        widths.append(beam)
        return []

    monkeypatch.setattr("d2v_scale.finetuning.evaluation.beam_search", note)
    call = ["probe", made, "--test", shards, "--task", "ctc"]
    assert run(*call) == run(*call, "--beam", 5) == run(*call, "--beam", 1) == 0
    assert widths == [3] * 4 + [5] * 4
    assert run(*call, "--beam", 0) == 2
    assert "--beam is 0" in capsys.readouterr().err


def test_lost_samples_and_sets_that_do_not_fit_are_said(
    run: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = image_samples(200, side=16)
    samples[3]["png"] = b"no image"
    write_set(tmp_path / "test", "test", "image", samples, per_shard=300, classes=["a", "b", "c"])
    write_set(tmp_path / "other", "test", "image", samples[:3], per_shard=30, classes=["c", "b", "a"])
    tuned = checkpoint(tmp_path / "run", "v1_vision", TaskConfig(classes=3))
    out = ["--out", tmp_path / "result.json"]
    assert run("probe", tuned, "--data", images, "--test", tmp_path / "test", "--k", 3, *out) == 0
    assert "lost: 0 training and 1 held-out samples" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["test_samples"], result["test_lost"], result["train_lost"]) == (199, 1, 0)
    assert run("probe", tuned, "--test", tmp_path / "test", "--task", "classify", *out) == 0
    assert json.loads((tmp_path / "result.json").read_text())["test_lost"] == 1
    assert run("probe", tuned, "--data", images, "--test", tmp_path / "other") == 2
    assert "Class 0 is 'c'" in capsys.readouterr().err
