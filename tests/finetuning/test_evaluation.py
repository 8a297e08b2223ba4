"""d2v_scale.finetuning.evaluation"""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from small_shards import image_samples, sound_samples

from d2v_scale.batch import Batch
from d2v_scale.data.config import DataConfig
from d2v_scale.data.labels import Vocabulary
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.evaluation.config import EvaluationConfig
from d2v_scale.finetuning.config import TaskConfig
from d2v_scale.finetuning.evaluation import TaskEvaluation
from d2v_scale.finetuning.model import TaskModel
from d2v_scale.modalities.speech.decoder import measure
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import groups
from d2v_scale.recipe import Recipe
from d2v_scale.shards.writing import write_set


class Engine:
    """A model in one process, without DeepSpeed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.topology = module, groups.single_process()

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.fixture
def recipe(tmp_path: Path, world_of_one: None) -> Recipe:
    samples = image_samples(10, side=16)
    samples[2]["png"] = b"no image"
    samples[3]["cls"] = 5
    write_set(tmp_path, "test", "image", samples, per_shard=20, classes=["a", "b", "c"])
    model, task = tiny_models.model("v1_vision"), TaskConfig(classes=3)
    data = DataConfig(max_bad_ratio=0.9)
    return Recipe(model=model, task=task, data=data, evaluation=EvaluationConfig(test=str(tmp_path)))


def student(recipe: Recipe) -> Any:
    assert recipe.task is not None
    module = TaskModel(recipe.model, recipe.task)
    initialize(module, 1)
    return Engine(module)


def test_metrics_say_of_how_many_samples_they_are(recipe: Recipe) -> None:
    evaluation = TaskEvaluation.of(recipe, student(recipe), ["a", "b", "c"])
    assert evaluation is not None
    measured = evaluation.measure()
    assert (measured["samples"], measured["lost"]) == (8, 2)
    assert 0 <= measured["accuracy"] <= 1


def test_held_out_shards_of_other_classes_are_refused(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"Class 1 is 'c' in .* and 'b' in"):
        TaskEvaluation.of(recipe, student(recipe), ["a", "c"])
    assert recipe.task is not None
    recipe.task.classes = 2
    with pytest.raises(ConfigError, match=r"task\.classes: is 2, but the shards' index names 3"):
        TaskEvaluation.of(recipe, student(recipe), ["a", "b"])


class Speller(Engine):
    """Says the same of every recording of a name, in its first frames."""

    def __init__(self, module: torch.nn.Module, said: dict[str, str], vocabulary: Vocabulary) -> None:
        super().__init__(module)
        self._said, self._vocabulary = said, vocabulary

    def __call__(self, batch: Batch, draw: Draw) -> torch.Tensor:
        logits = self.module(batch, draw).zero_()
        logits[..., Vocabulary.blank] = 1.0
        for row, name in enumerate(batch.keys):
            for at, number in enumerate(self._vocabulary.encode(self._said[name]).tolist()):
                # A blank between, for letters that come twice.
                logits[row, 2 * at, number] = 2.0
        return logits


def test_characters_outside_the_vocabulary_are_errors_not_left_out(tmp_path: Path, world_of_one: None) -> None:
    spoken = ["call  911 Now", "FÜR MICH", "42"]
    samples = [sample | {"txt": spoken[k]} for k, sample in enumerate(sound_samples(3))]
    write_set(tmp_path, "test", "recording", samples, per_shard=20, measure=measure)
    task = TaskConfig(kind="ctc")
    evaluation = EvaluationConfig(test=str(tmp_path))
    recipe = Recipe(model=tiny_models.model("v1_speech"), task=task, evaluation=evaluation)
    said = dict(zip((str(sample["__key__"]) for sample in samples), ["CALL NOW", "FR MICH", ""], strict=True))
    module = TaskModel(recipe.model, task)
    initialize(module, 1)
    found = TaskEvaluation.of(recipe, Speller(module, said, Vocabulary()), [])  # type: ignore[arg-type]
    assert found is not None
    measured = found.measure()
    # 911, FÜR and 42 of six words; "911 " and Ü and 42 of 22 characters.
    assert measured["wer"] == pytest.approx(3 / 6)
    assert measured["cer"] == pytest.approx(7 / 22)
    assert measured["outside_vocabulary"] == 6
    assert measured["samples"] == 3
