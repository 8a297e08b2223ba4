from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from d2v_scale.batch import Batch
from d2v_scale.data2vec.likeness import debiased_cka
from d2v_scale.data2vec.statistics import rankme
from d2v_scale.evaluation.config import EvaluationConfig
from d2v_scale.evaluation.features import mean_over_layers
from d2v_scale.evaluation.online import LabelledBatches, LabelNames, OnlineEvaluation, first_batches, rows
from d2v_scale.model.init import initialize
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.stack import Teacher
from d2v_scale.parallel import groups
from d2v_scale.parallel.zero import StudentEngine
from d2v_scale.recipe import Recipe
from d2v_scale.teacher.sharded import EmaTeacher


def speech(lengths: list[list[int]], samples_a_frame: int = 4) -> LabelledBatches:
    """Batches of waveforms with so many frames each; their labels count through."""
    made, number = [], 0
    for frames in lengths:
        valid_bt = torch.arange(max(frames))[None] < torch.tensor(frames)[:, None]
        valid = valid_bt.repeat_interleave(samples_a_frame, dim=1)
        ids = torch.arange(number, number + len(frames))
        batch = Batch(
            modality="speech",
            inputs=torch.where(valid, 1.0 + ids[:, None], 0.0),
            # As the loader has it: nothing to say where all are of one length.
            valid=None if len(set(frames)) == 1 else valid,
            masked_rt=torch.zeros_like(valid_bt),
            sample_ids=ids,
            keys=tuple(str(one) for one in ids.tolist()),
        )
        made.append((batch, ids))
        number += len(frames)
    return made


def test_batches_of_different_lengths_become_one() -> None:
    batch, labels = first_batches(speech([[3, 2], [4, 4], [2, 1]]), samples=6, size=10**6)
    assert labels.tolist() == batch.sample_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.keys == ("0", "1", "2", "3", "4", "5")
    assert batch.masked_rt.shape == (6, 4)
    assert batch.valid is not None
    assert batch.valid.sum(dim=1).tolist() == [12, 8, 16, 16, 8, 4]
    assert torch.equal(batch.inputs, torch.where(batch.valid, 1.0 + batch.sample_ids[:, None], 0.0))
    assert rows(batch, 2, 4).keys == ("2", "3")


@pytest.mark.parametrize(("samples", "size", "taken"), [(6, 10**6, 6), (5, 10**6, 4), (6, 4 * 16 * 4, 4), (1, 1, 2)])
def test_limits_hold_except_for_the_first_batch(samples: int, size: int, taken: int) -> None:
    batch, labels = first_batches(speech([[3, 2], [4, 4], [2, 1]]), samples=samples, size=size)
    assert len(labels) == len(batch.inputs) == taken


@pytest.mark.parametrize("name", tiny_models.ARRAYS)
def test_batches_of_arrays_become_one_where_some_are_whole(name: str) -> None:
    """What is said of patches was taken for what is said of values: the pictures at its end ended a run."""
    batches = [tiny_models.batch(name, padded=padded) for padded in (True, False, True)]
    shown = [replace(one, masked_rt=torch.zeros_like(one.masked_rt), real_bt=None, layout=None) for one in batches]
    batch, _ = first_batches([(one, one.sample_ids) for one in shown], samples=9, size=10**6)
    whole = torch.ones_like(shown[1].masked_rt)
    assert batch.valid is not None
    assert torch.equal(batch.valid, torch.cat([whole if one.valid is None else one.valid for one in shown]))
    assert torch.equal(batch.inputs, torch.cat([one.inputs for one in shown]))
    assert batch.grid == shown[0].grid


def test_a_grid_of_joined_recordings_is_that_of_the_longest() -> None:
    lines = speech([[3, 2], [4, 4]], samples_a_frame=4)
    on_grids = [(replace(one, grid=(one.masked_rt.shape[1], 1)), labels) for one, labels in lines]
    batch, _ = first_batches(on_grids, samples=4, size=10**6)
    assert batch.grid == (4, 1)


class TeacherOfAModule(EmaTeacher):
    def __init__(self, module: Teacher) -> None:
        """Nothing is averaged."""
        self.module = self.own = module
        self.follows = True

    def features(self, batch: Batch, features_btd: object, layers: list[int]) -> list[torch.Tensor]:
        assert features_btd is None, "it has a stem of its own"
        return self.own.features(batch, None, layers)


class EngineAlone(StudentEngine):
    def __init__(self) -> None:
        """Of a student that nothing asks for."""
        self.module, self.topology = torch.nn.Identity(), groups.single_process()


def evaluated(train: LabelledBatches, test: LabelledBatches, depth: int) -> tuple[OnlineEvaluation, Teacher]:
    teacher = Teacher(tiny_models.model("v2_vision", depth=depth), None, TeacherParts())
    initialize(teacher, 0)
    config = EvaluationConfig(k=3, layers=[-1])
    online = OnlineEvaluation(config, train, test, EngineAlone(), TeacherOfAModule(teacher), LabelNames([], None))
    return online, teacher


def dark_and_light(seed: int, contrast: float = 4.0) -> LabelledBatches:
    """Pictures of noise around two levels, which are their labels; two batches."""
    batches = []
    for part in range(2):
        batch = tiny_models.batch("v2_vision", samples=6, seed=seed + part, clones=1)
        labels = torch.arange(6) % 2
        inputs = 0.5 * batch.inputs + contrast * labels[:, None, None, None]
        batches.append(
            (replace(batch, inputs=inputs, masked_rt=torch.zeros_like(batch.masked_rt), layout=None), labels)
        )
    return batches


@pytest.mark.usefixtures("world_of_one")
def test_raw_features_are_measured_beside_the_teacher_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a representation has to be better than was recorded by `d2v align` alone."""
    online, _ = evaluated(dark_and_light(0), dark_and_light(10), depth=1)
    first = online.figures()
    assert (first["knn_raw"], first["knn_chance"], first["knn_samples"]) == (1.0, 0.5, 12)
    assert "layer_likeness" not in first, "one layer is like itself"
    monkeypatch.setattr("d2v_scale.evaluation.online.hashed", None)
    assert online.figures() == first


@pytest.mark.usefixtures("world_of_one")
def test_the_first_and_the_last_layer_are_compared() -> None:
    test = dark_and_light(10, contrast=0.0)
    online, teacher = evaluated(dark_and_light(0), test, depth=3)
    likeness = online.figures()["layer_likeness"]
    states = [teacher.features(batch, None, [0, 2]) for batch, _ in test]
    first, last = (torch.cat([of_layer.mean(dim=1) for of_layer in both]) for both in zip(*states, strict=True))
    assert likeness == pytest.approx(float(debiased_cka(first, last).mean()), abs=1e-6)
    assert likeness < 0.9999
    with torch.no_grad():
        for block in teacher.blocks[1:]:
            for parameter in block.parameters():  # type: ignore[union-attr]
                parameter.zero_() if parameter.dim() > 1 else None
    assert online.figures()["layer_likeness"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.usefixtures("world_of_one")
def test_rankme_is_of_the_features_that_k_nn_looks_at_and_needs_no_label() -> None:
    test = dark_and_light(10, contrast=0.0)
    online, teacher = evaluated([], test, depth=2)
    last_nd = torch.cat([teacher.features(batch, None, [1])[0].mean(dim=1) for batch, _ in test])
    assert online.figures() == pytest.approx({"rankme": float(rankme(mean_over_layers(last_nd[None])))}, rel=1e-5)
    with_labels, _ = evaluated(dark_and_light(0), test, depth=2)
    assert with_labels.figures()["rankme"] == online.figures()["rankme"]
    online._trained_on = True
    assert online.figures() == {}


@pytest.mark.parametrize("follows", [True, False])
def test_pictures_say_whose_features_they_show(
    follows: bool, monkeypatch: pytest.MonkeyPatch, world_of_one: None
) -> None:
    batches = dark_and_light(1)
    online, model = evaluated(batches, batches, depth=3)
    teacher = online._teacher
    monkeypatch.setattr(teacher, "follows", follows)
    monkeypatch.setattr(teacher, "student", SimpleNamespace(module=model), raising=False)
    monkeypatch.setattr(teacher, "features_of_student", lambda batch, layers: model.features(batch, None, layers))
    gallery = online.gallery(Recipe(model=tiny_models.model("v2_vision")), step=2)
    assert gallery.encoder == ("teacher" if follows else "student")
