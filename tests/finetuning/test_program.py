"""The training program with a task: topologies, stops, what it starts from, what stays frozen."""

import json
from pathlib import Path

import pytest
import torch
from launch import ROOT, run_ranks
from small_shards import image_samples, sound_samples

from d2v_scale.checkpoint import open_any, write_single
from d2v_scale.command_line import parse
from d2v_scale.modalities.speech.decoder import measure
from d2v_scale.model.init import initialize
from d2v_scale.networks.stack import Student
from d2v_scale.recipe import Recipe, to_dict
from d2v_scale.shards.writing import write_set

TRAIN = ROOT / "d2v_scale" / "train.py"
QUIET = {"tracking__enabled": False, "tracking__plot_every": "null", "tracking__log_every": 1, "data__workers": 0}
QUIET |= {"evaluation__every": 0}
CONVS = ("stems.speech.features.conv",)


def train(world_size: int, **keys: object) -> None:
    options = [text for name, value in keys.items() for text in (f"--{name.replace('__', '.')}", str(value))]
    run_ranks(world_size, TRAIN, *options)


def records(run_dir: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run_dir) if "loss" in record}


def pretrained(path: Path, recipe: Recipe) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint whose teacher differs from its student and does not own the stem's features."""
    tensors = {}
    for kind, seed in (("student", 5), ("teacher", 6)):
        student = Student(recipe.model)
        initialize(student, seed)
        tensors[kind] = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    tensors["teacher"] = {n: t for n, t in tensors["teacher"].items() if recipe.parts().role(n) != "absent"}
    write_single(path, tensors["student"], tensors["teacher"], {"recipe": json.loads(json.dumps(to_dict(recipe)))})
    return tensors


def speech_recipe(tmp_path: Path) -> dict[str, object]:
    # All of one length: shorter ones are not independent of how far they are padded (nor in the reference).
    samples = [
        s | {"txt": ["one two", "no", "yes"][k % 3]} for k, s in enumerate(sound_samples(24, seconds=(0.4, 0.4)))
    ]
    write_set(tmp_path / "shards", "train", "recording", samples, per_shard=10, measure=measure)
    return {
        "recipe": "finetune_words",
        "data": tmp_path / "shards",
        "evaluation__test": tmp_path / "shards",
        "global_batch_size": 6,
        "optim__eps": 1e-4,
        # Channels and dropout are drawn by the ranks' own generators.
        "task__ctc__channel_mask": 0,
        **QUIET,
    }


def test_a_stopped_run_continues_on_other_processes_and_its_encoder_waits(tmp_path: Path, world_of_one: None) -> None:
    """Two ranks at ZeRO-3 until step 2, then one at ZeRO-1; the encoder learns from update 2 on."""
    recipe, _ = parse(["--recipe", "demo_speech"])
    tensors = pretrained(tmp_path / "pretrained", recipe)
    options = speech_recipe(tmp_path) | {"task__freeze_updates": 2}
    moved, still = tmp_path / "moved", tmp_path / "still"
    init = {"init_from": tmp_path / "pretrained"}
    zero3 = ROOT / "ds_configs" / "zero3.json"
    train(2, **options, **init, run_dir=moved, stop_at=2, checkpoint__keep_last=9, deepspeed_config=zero3)
    frozen = open_any(moved)
    for name in frozen.names("student"):
        if not name.startswith("head."):
            kind = "teacher" if name in tensors["teacher"] else "student"
            assert torch.equal(frozen.tensor("student", name), tensors[kind][name]), name
    assert "teacher" not in frozen.kinds()
    # The encoder it began with may be gone by now.
    train(1, resume=moved, stop_at=7, deepspeed_config=ROOT / "ds_configs" / "zero1.json")
    train(1, **options, **init, run_dir=still, stop_at=7)
    assert losses(moved) == pytest.approx(losses(still), rel=1e-5)
    found, expected = open_any(moved), open_any(still)
    assert found.extra["data"] == expected.extra["data"]
    # Over all ranks, and over the restart.
    assert found.extra["totals"] == expected.extra["totals"]
    assert [record["data/delivered"] for record in records(moved) if "data/delivered" in record][-1] == 7 * 6
    for name in expected.names("student"):
        difference = (found.tensor("student", name) - expected.tensor("student", name)).abs().max()
        assert float(difference) < 1e-5, name
        moved_on = not torch.equal(expected.tensor("student", name), frozen.tensor("student", name))
        assert moved_on != name.startswith(CONVS), name
    measured = [record for record in records(moved) if "test/wer" in record]
    assert {record["step"] for record in measured} == {0, 2, 7}
    assert {(record["test/samples"], record["test/lost"]) for record in measured} == {(24, 0)}


def test_images_start_from_the_student_where_the_recipe_says_so(tmp_path: Path, world_of_one: None) -> None:
    """Also: two ranks with uneven shares, the model's sizes come from the checkpoint, the classes from the index."""
    recipe, _ = parse(
        ["--recipe", "demo_vision", "--model.backbone.depth", "2", "--objective.target.top_k_layers", "1"]
    )
    tensors = pretrained(tmp_path / "pretrained", recipe)
    write_set(tmp_path / "shards", "train", "image", image_samples(20), per_shard=10, classes=["a", "b", "c"])
    run_dir = tmp_path / "run"
    options = {"task__weights": "student", "init_from": tmp_path / "pretrained", "global_batch_size": 7}
    options |= {"data": tmp_path / "shards", "evaluation__test": tmp_path / "shards", "run_dir": run_dir}
    task = {"task__image__mixup": 0.8, "task__image__rand_augment": 9, "task__backbone__drop_path": 0.1}
    train(2, recipe="finetune_digits", **options, **task, stop_at=2, checkpoint__keep_last=9, **QUIET)
    begun = open_any(run_dir / "checkpoints" / "step-00000000")
    assert begun.extra["recipe"]["model"]["backbone"]["depth"] == 2
    assert begun.extra["recipe"]["task"]["classes"] == 3
    assert begun.shape("student", "head.out.weight") == (3, 96)
    for name in set(begun.names("student")) & tensors["student"].keys():
        assert torch.equal(begun.tensor("student", name), tensors["student"][name]), name
    assert {step: record for step, record in losses(run_dir).items() if step <= 2}.keys() == {1, 2}
