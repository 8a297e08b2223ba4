"""d2v_scale.modalities: what stems say of themselves, and that no kind is forgotten."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny_models
import torch

from d2v_scale import modalities
from d2v_scale.data.config import DataConfig
from d2v_scale.data.content import length_of
from d2v_scale.model.layers import describe
from d2v_scale.model.stack import Student

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", tiny_models.NAMES)
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
        assert stem.extent(DataConfig()) == (batch.inputs.shape[-1], stem.fixed_grid)
    else:
        size, grid = stem.extent(DataConfig(), batch.inputs.shape[-1])
        assert (size, grid) == (batch.inputs.shape[-1], batch.extents)


def test_every_kind_is_in_the_table() -> None:
    answers = [modalities.class_of(kind) for kind in modalities.KINDS]
    assert len(set(answers)) == len(modalities.KINDS) == 3
    for kind in modalities.KINDS:
        assert modalities.kind_of(kind) == kind
        assert modalities.drawing_of(kind) is not None
    with pytest.raises(ValueError, match="no stem 'smell'"):
        modalities.kind_of("smell")


def test_what_a_modality_says_needs_no_torch() -> None:
    program = "import sys, d2v_scale.modalities; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_type_checker_names_every_place_that_forgets_a_kind(tmp_path: Path) -> None:
    source = (ROOT / "d2v_scale" / "modalities" / "__init__.py").read_text()
    fourth = source.replace('Literal["vision", "speech", "text"]', 'Literal["vision", "speech", "text", "smell"]')
    assert fourth != source
    (tmp_path / "forgotten.py").write_text(fourth)
    config = tmp_path / "mypy.ini"
    config.write_text(
        textwrap.dedent("""
        [mypy]
        follow_imports = silent
        ignore_missing_imports = True
    """)
    )
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), str(tmp_path / "forgotten.py")]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    lines = [line for line in found.splitlines() if "assert_never" in line]
    assert len(lines) == fourth.count("assert_never(kind)") == 2, found


@pytest.mark.parametrize("kind", modalities.KINDS)
def test_shards_without_a_recipe_have_a_model_and_what_is_read_of_the_longest_sample(kind: modalities.Kind) -> None:
    model = modalities.class_of(kind).plain_model(pieces=300)
    [stem] = modalities.stems(model)
    assert stem.name == kind
    longest = stem.longest_read(DataConfig())
    assert (longest is None) == (length_of(stem.content).shown is None)
    if longest is not None:
        _, [positions] = stem.extent(DataConfig(), longest + 1)
        assert positions > stem.extent(DataConfig(), longest // 2)[1][0]
    if stem.uses_tokenizer:
        assert model.text is not None
        assert (model.text.vocab_size, model.text.mask_id) == (301, 300)
        assert longest == model.text.max_positions - 1
