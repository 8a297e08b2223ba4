"""d2v_scale.finetuning.start: what a run takes from its encoder, and what it may not ask for."""

import json
from pathlib import Path

import pytest

from d2v_scale.checkpoint import write_single
from d2v_scale.command_line import parse
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.finetuning.start import adopt
from d2v_scale.interop.encoder_source import check_tokenizer, open_encoder
from d2v_scale.model.init import initialize
from d2v_scale.networks.stack import Student
from d2v_scale.recipe import to_dict


@pytest.fixture
def encoder(tmp_path: Path, world_of_one: None) -> Path:
    """A checkpoint of the vision demo with two blocks."""
    depth = ["--model.backbone.depth", "2", "--objective.target.top_k_layers", "1"]
    recipe, _ = parse(["--recipe", "demo_vision", *depth])
    student = Student(recipe.model)
    initialize(student, 1)
    tensors = {name: parameter.detach() for name, parameter in student.named_parameters()}
    extra = {"recipe": json.loads(json.dumps(to_dict(recipe))), "tokenizer_sha256": "a" * 64}
    write_single(tmp_path / "checkpoints", tensors, tensors, extra)
    return tmp_path


def test_a_named_recipe_gives_way_to_the_encoder_and_an_override_is_not_dropped(encoder: Path) -> None:
    call = ["--recipe", "finetune_digits", "--init_from", str(encoder), "--data", "x"]
    recipe, options = parse([*call, "--task.backbone.dropout", "0.2"])
    assert recipe.model.backbone.depth != 2
    assert adopt(recipe, options) is not None
    assert (recipe.model.backbone.depth, recipe.model.backbone.dropout) == (2, 0.2)
    for key, value in (("backbone.depth", "7"), ("backbone.drop_path", "0.3"), ("vision.patch_size", "8")):
        with pytest.raises(ConfigError, match=rf"model\.{key}: is .* in the encoder.*task\.backbone"):
            adopt(*parse([*call, f"--model.{key}", value]))
    # What the encoder is anyhow, and how it runs, may be said.
    adopt(*parse([*call, "--model.backbone.depth", "2"]))


def test_text_of_another_tokenizer_than_the_encoders_is_refused(encoder: Path) -> None:
    source = open_encoder(encoder)
    for known in ("a" * 64, None):
        check_tokenizer(source.path, source.tokenizer_sha256, "shards", known)
    with pytest.raises(DataError, match=r"shards is tokenised .* \(sha256 bbbbbbbbbbbb\) than .*aaaaaaaaaaaa"):
        check_tokenizer(source.path, source.tokenizer_sha256, "shards", "b" * 64)
