"""What of a hidden part is told from the others: the measure sees what is there, and nothing where nothing is."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from paired_shards import paired_samples, write_pairs, write_recipe

from d2v_scale.command_line import parse
from d2v_scale.model.init import initialize
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.model.teacher_parts import TeacherParts
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel.groups import single_process

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))

import evidence_hidden  # noqa: E402
from evidence_joint_sets import JointSet  # noqa: E402


def test_only_what_is_shown_is_told(tmp_path: Path) -> None:
    single_process()
    index = write_pairs(tmp_path / "shards", paired_samples(20, lacking=False))
    recipe = parse([f"--recipe={write_recipe(tmp_path / 'recipe.yaml', index)}"])[0]
    held_out = evidence_hidden.HeldOut(JointSet("", "", str(index), "", "key", "label", True), recipe)
    with undivided():
        student = Student(recipe.model, target_widths=recipe.target_widths()).eval()
        teacher = Teacher(recipe.model, recipe.targets(), TeacherParts())
    for network in (student, teacher):
        initialize(network, 0)

    def predicted(changed: str) -> torch.Tensor:
        """Of the picture from the text alone; of the part `changed`, samples have another's."""
        batches = []
        for batch in held_out.batches():
            parts = [
                dataclasses.replace(part, inputs=part.inputs.roll(1, dims=0)) if part.modality == changed else part
                for part in batch.parts
            ]
            batches.append(dataclasses.replace(batch, parts=tuple(parts)))
        return evidence_hidden.predictions_of(student, iter(batches), "vision", ["text"])

    assert torch.equal(predicted(""), predicted("vision"))
    assert torch.equal(predicted(""), predicted("speech"))
    assert not torch.equal(predicted(""), predicted("text"))
    row = evidence_hidden.told(student, teacher, held_out)
    assert len(row["told"]) == 9
    # Nothing is learned yet, so one sample's others are as good as another's.
    assert all(abs(one["told"]) < 0.05 for one in row["told"].values())
    shared = evidence_hidden.shared_by({"instance": teacher}, held_out)
    assert all(0 < share < 1 for share in shared["mixed"]["instance"].values())


def test_what_concepts_share_is_their_share_of_the_variance() -> None:
    rng = torch.Generator().manual_seed(0)
    concepts = [str(k // 10) for k in range(2000)]
    of_concept_ntd = torch.randn(200, 3, 2, generator=rng, dtype=torch.float64).repeat_interleave(10, dim=0)
    noise_ntd = torch.randn(2000, 3, 2, generator=rng, dtype=torch.float64)
    noise_ntd[::3, 2] = torch.nan
    place_td = torch.arange(6.0).view(3, 2)
    share = evidence_hidden.known_share(of_concept_ntd + 2 * noise_ntd + place_td, concepts)
    assert share == pytest.approx(0.2, abs=0.02)
    assert evidence_hidden.known_share(noise_ntd, concepts) == pytest.approx(0.0, abs=0.02)
    assert evidence_hidden.mixed_share(noise_ntd, noise_ntd.roll(3, dims=0)) == pytest.approx(1.0, abs=0.05)
    found = evidence_hidden.found_share(of_concept_ntd[:200] + 5 * place_td, of_concept_ntd[:200], concepts[:200])
    assert found == pytest.approx(1.0)
    assert evidence_hidden.found_share(noise_ntd[:200], of_concept_ntd[:200], concepts[:200]) < 0.15
    assert evidence_hidden.chance(concepts[:200]) == pytest.approx(0.05)


def test_the_tables_of_the_benchmarks_are_those_of_the_rows() -> None:
    text = (ROOT / "BENCHMARKS.md").read_text()
    folders = sorted((ROOT / "docs" / "evidence").glob("hidden_*"))
    assert folders
    for folder in folders:
        for part in evidence_hidden.written(folder).strip().split("\n\n"):
            assert part in text
