"""docs/arrays.md: its recipes are what they say, and train; its commands exist; its keys are those of the section."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import papers
import pytest
import yaml
from launch import run_program
from numpy.typing import NDArray

from d2v_scale.command_line import parse
from d2v_scale.commands.verbs import VERBS
from d2v_scale.conversion.array_members import npy_bytes
from d2v_scale.modalities.array.members import measure
from d2v_scale.model.log_mel_config import LogMel
from d2v_scale.model.stem_config import ArrayAxis, ArrayStem
from d2v_scale.recipe import Recipe
from d2v_scale.shards.writing import write_set

TEXT = (papers.ROOT / "docs" / "arrays.md").read_text()
RECIPES = {str(yaml.safe_load(block)["name"]): block for block in papers.blocks(TEXT, "yaml")}
SAMPLES = 6

SMALL = ["--model.backbone.width=32", "--model.backbone.heads=4", "--model.backbone.ffn=64", "--model.backbone.depth=2"]
SMALL += ["--model.predictor.width=32", "--model.predictor.layers=1", "--objective.target.top_k_layers=2"]
SMALL += ["--objective.masking.clones=2", "--global_batch_size=4", "--optim.max_steps=2", "--optim.warmup_steps=0"]
SMALL += ["--data.workers=0", "--tracking.enabled=false", "--tracking.plot_every=null"]


def eeg(rng: np.random.Generator) -> NDArray[Any]:
    values = rng.standard_normal((19, rng.integers(300, 5000))) * 3e-5
    values[4, 100:160] = np.nan
    return values


def ecg(rng: np.random.Generator) -> NDArray[Any]:
    return rng.standard_normal((1, 12, rng.integers(1000, 6000))).astype(np.float32)


def spectrogram(rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 30_000, (2, 64, rng.integers(40, 1025)), dtype=np.int16)


def video(rng: np.random.Generator) -> NDArray[Any]:
    return rng.integers(0, 256, (3, rng.integers(8, 24), 112, rng.integers(80, 113)), dtype=np.uint8)


def dna(rng: np.random.Generator) -> NDArray[Any]:
    return rng.choice(np.frombuffer(b"ACGT", np.uint8), (1, rng.integers(500, 9000)))


ARRAYS: dict[str, Callable[[np.random.Generator], NDArray[Any]]] = {
    one.__name__: one for one in (eeg, ecg, spectrogram, video, dna)
}
"""Random ones of the shapes and types that each section names."""


def recipe_of(name: str, folder: Path, *arguments: str) -> Recipe:
    path = folder / f"{name}.yaml"
    path.write_text(RECIPES[name])
    shards = f"--data={next(iter(yaml.safe_load(RECIPES[name])['model']['arrays']))}={folder / 'x.tar'}"
    recipe, _ = parse(["--recipe", str(path), shards, *arguments])
    recipe.check(1)
    return recipe


def test_each_section_has_its_recipe() -> None:
    assert list(RECIPES) == list(ARRAYS)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_recipe_is_one_of_arrays_such_as_its_section_names(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(name, tmp_path)
    [stem] = recipe.model.arrays.values()
    shape = ARRAYS[name](np.random.default_rng(0)).shape
    assert (stem.channels, len(stem.axes)) == (shape[0], len(shape) - 1)


def test_a_size_of_a_mask_in_units_is_of_so_many_positions(tmp_path: Path) -> None:
    found = {name: next(iter(recipe_of(name, tmp_path).masking().values())).size for name in RECIPES}
    assert found == {
        "eeg": {"time": 5},
        "ecg": {"lead": 2, "time": 4},
        "spectrogram": {"band": 1, "time": 5},
        "video": {"time": 1, "height": 3, "width": 3},
        "dna": {"base": 8},
    }


def test_the_recipes_train_two_steps(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    for name, draw in ARRAYS.items():
        samples = [{"__key__": f"s{k}", "npy": npy_bytes(draw(rng)), "cls": k % 2} for k in range(SAMPLES)]
        write_set(tmp_path, name, "array", samples, per_shard=SAMPLES, measure=measure)
        recipe_of(name, tmp_path)
        stem = next(iter(yaml.safe_load(RECIPES[name])["model"]["arrays"]))
        code, output = run_program(
            papers.ROOT / "d2v_scale/train.py",
            *("--recipe", f"{name}.yaml", "--data", f"{stem}={name}.index.json", "--run_dir", name, *SMALL),
            cwd=tmp_path,
        )
        assert code == 0, f"{name}\n{output[-4000:]}"
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        assert len(losses) == 2, name
        assert np.isfinite(losses).all(), name
        assert not any(line.get("data/lost") for line in lines), name
        assert any(line.get("data/missing") for line in lines) == (name == "eeg")


def test_its_commands_are_verbs_and_name_their_content() -> None:
    for command in papers.commands(TEXT):
        program, verb, *_ = shlex.split(command)
        assert program == "d2v"
        assert verb in VERBS, command


def test_its_table_has_the_keys_of_the_section() -> None:
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    told = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    assert told <= {field.name for one in (ArrayStem, ArrayAxis, LogMel) for field in fields(one)}
    for one in (ArrayStem, ArrayAxis, LogMel):
        for field in fields(one):
            own = field.name not in {"prenet_depth", "input_dropout", "predictor", "paired"}
            assert not own or re.search(rf"`[^`\n]*\b{field.name}\b[^`\n]*`", TEXT), field.name
