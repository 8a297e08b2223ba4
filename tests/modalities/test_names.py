"""The name of a stem is open: what is keyed by it works for names that are no kind, and for several stems of a kind."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from small_shards import image_samples

from d2v_scale import modalities
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.labelled import LabelledSet
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig, ObjectiveConfig
from d2v_scale.data2vec.own import OwnLoss, OwnMasking, OwnObjective
from d2v_scale.errors import ConfigError, DataError
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import KINDS, AnyStem, OwnPredictor
from d2v_scale.networks.draw import Draw
from d2v_scale.parallel import ds_config, groups
from d2v_scale.planning import flops
from d2v_scale.plots.samples import plot_masks
from d2v_scale.pretraining.engines import build_engines
from d2v_scale.pretraining.step import train_step
from d2v_scale.recipe import Recipe
from d2v_scale.shards.writing import write_set


@dataclass(kw_only=True)
class NamedModel(ModelConfig):
    """Stems beside those that are called as their kind."""

    named: dict[str, AnyStem] = field(default_factory=dict)

    @property
    def stems(self) -> dict[str, AnyStem]:
        return {**super().stems, **self.named}

    def fields_of(self, stems: Mapping[str, AnyStem]) -> dict[str, Any]:
        named = {name: stem for name, stem in stems.items() if name not in KINDS}
        return super().fields_of(stems) | {"named": named}


@dataclass(kw_only=True)
class NamedObjective(ObjectiveConfig):
    """What those stems do differently."""

    named: dict[str, OwnObjective] = field(default_factory=dict)

    @property
    def own(self) -> dict[str, OwnObjective]:
        return {**super().own, **self.named}


def recipe_for(shards: Path) -> Recipe:
    """Two stems of images, `photo` and `scan`, which read the same shards in another size."""
    plain = tiny_models.model("v2_vision")
    photo, scan = tiny_models.vision("sincos"), tiny_models.vision("sincos")
    scan.image_size, scan.prenet_depth, scan.predictor = 24, 2, OwnPredictor(layers=1)
    model = NamedModel(
        visible_only=True,
        backbone=plain.backbone,
        predictor=plain.predictor,
        named={"photo": photo, "scan": scan},
    )
    objective = NamedObjective(masking=MaskingConfig(kind="random", prob=0.5, clones=2), target=tiny_models.TAPS)
    objective.named["scan"] = OwnObjective(masking=OwnMasking(clones=3), loss=OwnLoss(weight=2.0))
    sources = [SourceConfig(shards=str(shards / "train-*.tar"), modality=name) for name in ("photo", "scan")]
    return Recipe(
        model=model, objective=objective, data=DataConfig(sources=sources, workers=0), global_batch_size=4, seed=3
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of images."""
    out = tmp_path_factory.mktemp("images")
    write_set(out, "train", "image", image_samples(24), per_shard=12, classes=["a", "b", "c"])
    return out


def digests(folder: Path) -> dict[str, str]:
    """Of every file below a folder."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def loader_of(recipe: Recipe) -> StepLoader:
    return StepLoader(
        recipe.data, recipe.model, recipe.masking(), seed=recipe.seed, global_batch_size=recipe.global_batch_size
    )


def test_two_stems_with_names_of_their_own_train_on_one_set_of_shards(shards: Path, tmp_path: Path) -> None:
    recipe, before = recipe_for(shards), digests(shards)
    recipe.check(1)
    assert recipe.data.source_names() == recipe.model.modalities == ["photo", "scan"]
    numbers = ds_config.RecipeNumbers(precision="fp32", accumulation=1)
    config = ds_config.resolve({"zero_optimization": {"stage": 1}}, numbers, recipe.parallel, 1)
    student, teacher = build_engines(recipe, config, groups.single_process())
    names = [name for name, _ in student.module.named_parameters()]
    for name in ("photo", "scan"):
        assert any(parameter.startswith(f"stems.{name}.features.") for parameter in names)
        assert any(parameter.startswith(f"predictors.{name}.") for parameter in names)
    assert not any(kind in parameter.split(".") for parameter in names for kind in KINDS)
    assert {len(student.module.stems[name].prenet) for name in ("photo", "scan")} == {1, 2}
    loader, seen = loader_of(recipe), dict[str, int]()
    while len(seen) < 2:
        [batch] = next(loader)
        assert batch.source == batch.modality
        assert (batch.inputs.shape[-1], batch.clones) == {"photo": (16, 2), "scan": (24, 3)}[batch.modality]
        result, observed = train_step(student, teacher, [batch], recipe.objective, Draw(1, len(seen)), observe=False)
        assert result.applied
        assert float(observed.samples) == 4
        seen[batch.modality] = seen.get(batch.modality, 0) + 1
        kind = recipe.model.kind(batch.modality)
        assert plot_masks(batch, kind, tmp_path / f"{batch.modality}.png").is_file()
    teacher.destroy()
    student.destroy()
    assert digests(shards) == before


def test_stems_that_share_shards_read_them_as_if_alone(shards: Path) -> None:
    """The batches of each are those that it has without the other."""
    together = recipe_for(shards)
    loader, found = loader_of(together), dict[str, list[tuple[str, ...]]](photo=[], scan=[])
    while min(map(len, found.values())) < 5:
        [batch] = next(loader)
        found[batch.modality].append(batch.keys)
    for number, name in enumerate(found):
        alone = recipe_for(shards)
        alone.data.sources = [alone.data.sources[number]]
        batches = loader_of(alone)
        assert found[name][:5] == [next(batches)[0].keys for _ in range(5)]


def test_a_stem_of_any_name_answers_for_itself(shards: Path) -> None:
    recipe = recipe_for(shards)
    assert [stem.name for stem in modalities.stems(recipe.model)] == ["photo", "scan"]
    assert recipe.model.kind("scan") == "vision"
    assert recipe.of("scan").model.modalities == ["scan"]
    assert recipe.model.alone("scan").stems["scan"].prenet_depth == 2
    assert {name: recipe.objective.of(name).loss.weight for name in ("photo", "scan")} == {"photo": 1.0, "scan": 2.0}
    assert flops.cost_of(recipe, "scan").total > flops.cost_of(recipe, "photo").total
    assert list(recipe.target_widths()) == list(recipe.targets()) == ["photo", "scan"]
    labelled = LabelledSet(str(shards), "scan", recipe.data, recipe.model, batch_size=24)
    [(batch, labels_b)] = labelled
    assert (batch.modality, len(labels_b)) == ("scan", 24)


def test_shards_are_named_for_stems_of_any_name(shards: Path) -> None:
    recipe = recipe_for(shards)
    recipe.data.read_from("scan=a,b.tar,photo=c.tar", recipe.model.modalities)
    assert [(source.modality, source.shards) for source in recipe.data.sources] == [
        ("scan", "a,b.tar"),
        ("photo", "c.tar"),
    ]
    with pytest.raises(ConfigError, match=r"2 stems\. Write --data 'photo=PATTERN,scan=PATTERN'"):
        recipe.data.read_from("a.tar", recipe.model.modalities)


def test_a_wrong_name_is_refused_with_the_names_there_are(shards: Path) -> None:
    recipe = recipe_for(shards)
    recipe.data.sources[1].modality = "scam"
    with pytest.raises(ConfigError, match=r"'scam', which the model has no stem for\. It has photo, scan") as error:
        recipe.check(1)
    assert error.value.key == "data.sources.1.modality"
    recipe = recipe_for(shards)
    assert isinstance(recipe.objective, NamedObjective)
    recipe.objective.named["scam"] = OwnObjective()
    with pytest.raises(ConfigError, match=r"no stem scam\. Leave it out; the model has photo, scan") as error:
        recipe.check(1)
    assert error.value.key == "objective.scam"


def test_a_stem_that_reads_something_else_is_refused_by_its_name(shards: Path) -> None:
    recipe = recipe_for(shards)
    assert isinstance(recipe.model, NamedModel)
    recipe.model.named["heart"] = tiny_models.speech(alibi=True)
    recipe.data.sources = [replace(recipe.data.sources[0], modality="heart")]
    with pytest.raises(DataError, match="the shards hold images, but the stem 'heart' reads recordings"):
        loader_of(recipe)


def test_numbered_sources_take_no_other_stems_name() -> None:
    """Two sources of `ecg` beside the stem `ecg2` were called `ecg1` and `ecg2`."""
    sources = [SourceConfig(modality=name) for name in ("ecg2", "ecg", "ecg", "ecg1")]
    names = DataConfig(sources=sources).source_names()
    assert (names[0], names[3]) == ("ecg2", "ecg1")
    assert len(set(names)) == 4
    assert all(name.startswith("ecg") for name in names)
