"""`d2v align` as it is used: joint runs and separate ones, real members, controls, the page, refusals."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny_models
from concept_shards import joint_model, samples, write_concepts, write_run
from mlflow import MlflowClient

from d2v_scale.alignment import aligning
from d2v_scale.alignment.result import scores_of
from d2v_scale.commands.align import main
from d2v_scale.shards.writing import write_shard
from d2v_scale.tracking import RunTracker, TrackingConfig
from d2v_scale.tracking.follow import catch_up
from d2v_scale.tracking.mirror_state import MirrorState

QUICK = ["--random_seeds", "2"]


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_concepts(tmp_path_factory.mktemp("concepts") / "set", 40, 60, categories=2)


@pytest.mark.slow
def test_what_was_found_is_in_mlflow_beside_the_run(
    concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A nested run with every score and verdict, and the page and the JSON with the run itself."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = write_run(tmp_path / "run", joint_model())
    tracker = RunTracker(run, TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    tracker.log(1, 1, {"loss": 1.0})
    tracker.finish("done")
    catch_up(run)
    assert main([str(run), "--data", str(concepts), *QUICK]) == 0
    assert f"Recorded in {run}, and in MLflow as a nested run of it." in capsys.readouterr().out
    client, known = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), MirrorState.load(run)
    of_run = f"tags.mlflow.parentRunId = '{known.run_id}'"
    [nested] = client.search_runs([known.experiment_id], of_run)
    assert nested.data.params["task"] == "align"
    assert nested.data.metrics == pytest.approx(scores_of(json.loads((run / "align" / "align.json").read_text())))
    assert "align/above_controls/vision-speech/CKA" in nested.data.metrics
    files = {file.path for file in client.list_artifacts(known.run_id, "align")}
    assert files == {"align/align.json", "align/align.html"}


class Outside(HTMLParser):
    """What a page needs from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [
            v for k, v in attrs if k in ("src", "href", "xlink:href") and v and v[0] != "#" and v[:5] != "data:"
        ]


def test_an_untrained_joint_run_is_not_above_its_controls(
    concepts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", joint_model())
    assert main([str(run), "--data", str(concepts), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "over concepts (bootstrap), as there is one run" in printed
    result = json.loads((run / "align" / "align.json").read_text())
    [pair] = result["pairs"].values()
    assert (pair["held_out_concepts"], pair["training_concepts"]) == (60, 40)
    assert list(pair["verdicts"]) == ["mapped R@10", "same-space R@10", "mutual k-NN", "CKA"]
    assert {one["verdict"] for one in pair["verdicts"].values()} == {"not above controls"}
    controls = {"random encoder", "raw features", "length alone", "shuffled pairs", "shuffled within categories"}
    assert set(pair["verdicts"]["mapped R@10"]["against"]) == controls
    assert pair["notes"] == ["length does not vary: it is not removed"]
    # Different widths have no space in common.
    assert set(pair["verdicts"]["same-space R@10"]["against"]) == controls - {"raw features"}
    assert result["comparisons"] == 19
    assert len(pair["layers"]["runs"]) == 3
    assert set(pair["layers"]["runs"][0]["retrieval"]) == {"mapped", "same", "centred"}
    page = (run / "align" / "align.html").read_text()
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert {"img", "audio", "svg", "table"} <= set(outside.tags)
    assert "script" not in outside.tags
    events = [json.loads(line) for line in (run / "mlflow_events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["evaluation", "artifact", "artifact"]
    assert events[0]["values"]["align/above_controls/vision-speech/mapped R10"] == 0.0
    assert {event["path"] for event in events[1:]} == {"align/align.json", "align/align.html"}


def test_separate_runs_of_several_seeds_are_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With samples of several members, some missing, without .json; recordings of different lengths."""
    made = samples(0, 110, each=2)
    for number, one in enumerate(made):
        del one["json"]
        if number % 20 == 0:
            del one["flac"]
        if number == 3:
            one["png"] = b"no picture"
    write_shard(tmp_path / "part-000000.tar", made)
    paths = []
    for seed in (1, 2):
        pictures, recordings = joint_model(), joint_model()
        pictures.speech, recordings.vision = None, None
        recordings.backbone = dataclasses.replace(recordings.backbone, depth=2, width=16)
        assert recordings.speech is not None
        paths += [write_run(tmp_path / f"v{seed}", pictures, seed), write_run(tmp_path / f"s{seed}", recordings, seed)]
    out = tmp_path / "out" / "result.json"
    options = ["--data", str(tmp_path), "--held_out", "0.5", "--out", str(out), "--per_concept", "1"]
    assert main([*map(str, paths), *options, *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "one set, split here" in printed
    assert "over runs (seeds) and concepts (bootstrap)" in printed
    result = json.loads(out.read_text())
    [pair] = result["pairs"].values()
    assert result["seeds"] == 2
    assert "same-space R@10" not in pair["verdicts"]  # the two have different widths
    assert "no categories: pairs are not shuffled within them" in pair["notes"]
    assert len(pair["layers"]["runs"]) == 3
    assert len(pair["verdicts"]["CKA"]["by_seed"]) == 2
    counts = result["data"]["samples"]
    assert sum(counts["speech"][side]["without"] for side in ("train", "held_out")) == 11
    assert sum(counts["vision"][side]["lost"] for side in ("train", "held_out")) <= 1
    assert sum(counts["vision"][side]["beyond_per_concept"] for side in ("train", "held_out")) == 110
    assert out.with_suffix(".html").is_file()
    assert all((path / "align" / "result.json").is_file() for path in paths)


def test_another_tokenizer_is_refused_before_anything_is_encoded(
    concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was found when pictures and recordings had been encoded, minutes later."""
    monkeypatch.setattr(aligning, "averaged", lambda *_: pytest.fail("samples are encoded"))
    run = write_run(tmp_path / "run", tiny_models.joint())
    told = refused(capsys, run, "--data", concepts, "--tokenizer", tmp_path / "absent.model")
    assert "absent.model" in told


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_ten_digits_in_many_samples_are_refused_with_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of the joint demo without its extra: to name a concept by its key, as was advised, asks for the one
    partner among forty that are as good."""
    run = write_run(tmp_path / "run", joint_model())
    told = refused(capsys, run, "--data", write_concepts(tmp_path / "digits", 7, 3, each=20))
    assert "holds 3 held-out concepts, by concept, fewer than 50" in told
    assert "give data of more concepts, 50 of them held out (the joint demo has them" in told
    assert "--concept" not in told
    apart = [sample | {"json": b'{"concept": "all"}'} for sample in samples(0, 60)]
    write_shard(tmp_path / "one.tar", apart)
    told = refused(capsys, run, "--data", tmp_path / "one.tar", "--held_out", "0.9")
    assert "say with --concept what names a concept" in told


def test_too_little_and_what_does_not_fit_is_refused(
    concepts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", joint_model())
    few = write_concepts(tmp_path / "few", 60, 49)
    assert "holds 49 held-out concepts, by concept, fewer than 50" in refused(capsys, run, "--data", few)
    same = concepts / "test"
    told = refused(capsys, run, "--data", same, "--test", same)
    assert "(60 more are on both sides: the concept: 60, the first: c40" in told
    assert "Take what is on both sides out of the training set" in told
    assert "3 training concepts, by concept, fewer than 20" in refused(
        capsys, run, "--data", write_concepts(tmp_path / "little", 3, 60)
    )
    assert "is given twice" in refused(capsys, run, run, "--data", concepts)
    copy = write_run(tmp_path / "copy", joint_model())
    assert "have the same weights" in refused(capsys, run, copy, "--data", concepts)
    deeper = joint_model()
    deeper.backbone = dataclasses.replace(deeper.backbone, depth=4)
    deeper_run = write_run(tmp_path / "deeper", deeper, 2)
    assert "are no seeds of one another" in refused(capsys, run, deeper_run, "--data", concepts)
    alone = write_run(tmp_path / "alone", tiny_models.model("v2_vision"), 2)
    assert "there is the stem 'vision' alone" in refused(capsys, alone, "--data", concepts)
    assert "both have a stem 'vision'" in refused(capsys, run, alone, "--data", concepts)
    assert "do not exist" in refused(capsys, run, "--data", tmp_path / "nothing")
    for option, value in (("--per_concept", 0), ("--random_seeds", 1), ("--held_out", 1.5)):
        assert f"{option} is {value}" in refused(capsys, run, "--data", concepts, option, value)
