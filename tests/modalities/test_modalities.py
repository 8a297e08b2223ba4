"""d2v_scale.modalities: what stems say of themselves, and that no kind is forgotten."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

from d2v_scale import modalities
from d2v_scale.data.config import DataConfig
from d2v_scale.networks.layers import describe
from d2v_scale.networks.stack import Student
from d2v_scale.shards.content import length_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [*tiny_models.NAMES, *tiny_models.WIDE, *tiny_models.ARRAYS])
@pytest.mark.usefixtures("world_of_one")
def test_a_stem_is_what_its_modality_says(name: str) -> None:
    model, batch = tiny_models.model(name), tiny_models.batch(name)
    [stem] = modalities.stems(model)
    with torch.device("meta"):
        student = Student(model)
    built = student.stems[stem.name]
    assert hasattr(built, "bias") == stem.has_bias == ("bias" in [layer.kind for layer in describe(model, stem.name)])
    assert built.extra_tokens == stem.extra_tokens == batch.extra_tokens
    assert len(batch.extents) == stem.axes
    if stem.fixed_grid is not None:
        assert stem.extent(DataConfig()) == (max(batch.inputs.shape[2:]), stem.fixed_grid)
    else:
        size, grid = stem.extent(DataConfig(), batch.inputs.shape[-1])
        assert (size, grid) == (batch.inputs.shape[-1], batch.extents)


def test_every_kind_is_in_the_table() -> None:
    answers = [modalities.class_of(kind) for kind in modalities.KINDS]
    assert len(set(answers)) == len(modalities.KINDS) == 4
    for kind in modalities.KINDS:
        assert modalities.class_of(kind).build_drawing() is not None


def test_what_a_modality_says_needs_no_torch() -> None:
    program = "import sys, d2v_scale.modalities; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def without_the_sets(imported: re.Match[str]) -> str:
    return imported[1] + ", ".join(name for name in imported[2].split(", ") if name not in ("Kind", "Content"))


def test_the_type_checker_names_every_place_that_forgets_a_kind_or_a_content(tmp_path: Path) -> None:
    """A copy of every file that matches one, to which both sets have one more member."""
    matching = [
        path
        for folder in ("d2v_scale", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"assert_never\((kind|content|[a-z.]+\.content)\)", path.read_text())
    ]
    more = (
        'Kind = Literal["vision", "speech", "text", "array", "smell"]\n'
        'Content = Literal["image", "recording", "text", "array", "scent"]\n'
    )
    places = 0
    for number, path in enumerate(matching):
        text = re.sub(r"^(from d2v_scale\S* import )(.*)", without_the_sets, path.read_text(), flags=re.M)
        text = re.sub(r"^from \S+ import $|^(Kind|Content) = .*$", "", text, flags=re.M)
        last = max(text.rfind("\nfrom d2v_scale"), text.rfind("\nfrom typing"))
        end = text.index("\n", last + 1) + 1
        (tmp_path / f"forgotten_{number}.py").write_text(f"{text[:end]}from typing import Literal\n{more}{text[end:]}")
        places += text.count("    assert_never(")
    (tmp_path / "mypy.ini").write_text("[mypy]\nfollow_imports = skip\nignore_missing_imports = True\n")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "."]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    forgotten = [line for line in found.splitlines() if "assert_never" in line]
    assert len(forgotten) == places >= 5, found
    assert all("smell" in line or "scent" in line for line in forgotten), found


@pytest.mark.parametrize("kind", [kind for kind in modalities.KINDS if kind != "array"])
def test_shards_without_a_recipe_have_a_model_and_what_is_read_of_the_longest_sample(
    kind: modalities.Kind, texts: Path
) -> None:
    model = modalities.class_of(kind).plain_model(texts / "tokenizer.model")
    [stem] = modalities.stems(model)
    assert stem.name == kind
    longest = stem.longest_read(DataConfig())
    assert (longest is None) == (length_of(stem.content).shown is None)
    if longest is not None:
        _, [positions] = stem.extent(DataConfig(), longest + 1)
        assert positions > stem.extent(DataConfig(), longest // 2)[1][0]
    if stem.uses_tokenizer:
        assert model.text is not None
        assert (model.text.vocab_size, model.text.mask_id) == (331, 330)
        assert longest == model.text.max_positions - 1
