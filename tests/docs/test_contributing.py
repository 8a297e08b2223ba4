"""CONTRIBUTING.md: its commands are those of tools/test.sh, and its examples are followed in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import papers
import pytest
from launch import PROCESS
from safetensors.torch import load_file
from small_shards import sound_samples

from d2v_scale.modalities.speech.decoder import measure
from d2v_scale.shards.writing import write_set

ROOT = papers.ROOT
TEXT = (ROOT / "CONTRIBUTING.md").read_text()

# Commands that are neither a line of tools/test.sh nor a way to call it, and why they are not run here.
ELSEWHERE = {
    "bash tools/install.sh demo,docs,test": "tools/test.sh begins with it",
    "export PATH=$PWD/.venv/bin:$PATH": "tools/test.sh does the same",
    "python -m pytest tests/data2vec": "tools/test.sh runs all of them",
}
PLAN = "python tools/plan.py --recipe small_vision64 --nodes 1 --gpus 8 --device h100"

MODULES = {
    block.partition("\n")[0].removeprefix("# "): block
    for block in papers.blocks(TEXT, "python")
    if block.startswith("# d2v_scale/")
}
"""Blocks that are modules of the package: the first line says which."""

RUNNER = """
import runpy, sys
end = sys.argv.index("tools/plan.py")
for path in sys.argv[1:end]:
    print("RUNNING", path, flush=True)
    runpy.run_path(path)
sys.argv = sys.argv[end:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""One process for everything, since it imports as long as it runs."""


def sections() -> dict[str, str]:
    """The text below each heading."""
    parts = re.split(r"^## (.*)\n", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_its_commands_are_those_of_the_checks() -> None:
    script = (ROOT / "tools" / "test.sh").read_text()
    lines = {line.strip() for line in script.splitlines()}
    for command in papers.commands(TEXT):
        assert papers.missing_files(command) == []
        if command.startswith("bash tools/test.sh"):
            assert all(f"{option})" in script for option in command.split()[2:]), command
        else:
            assert command in lines or command in ELSEWHERE or command == PLAN, command
    assert "bash tools/install.sh demo,docs,test" in lines


def test_every_file_that_it_names_exists() -> None:
    named = set(re.findall(r"`((?:d2v_scale|tests|tools|docs)/[\w/.-]+)`", TEXT))
    assert len(named) > 20
    created = {"d2v_scale/recipes/small_vision64.yaml"}
    assert [name for name in sorted(named - created) if not (ROOT / name).exists()] == []


def test_the_tour_visits_every_package() -> None:
    tour = sections()["The tour, as data flows"]
    packages = {path.parent.name for path in (ROOT / "d2v_scale").glob("*/__init__.py")}
    assert [name for name in sorted(packages) if f"{name}/" not in tour] == []
    # A name in the paragraph of a package is a file of it, of another that it is said to be in, or at the root.
    files = {path.name for path in (ROOT / "d2v_scale").rglob("*.py")}
    named = set(re.findall(r"`(?!tools/)(?:[\w/]+/)?(\w+\.py)`", tour))
    assert named <= files


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tools, with all examples applied."""
    root = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("d2v_scale", "tools", "ds_configs"):
        shutil.copytree(ROOT / name, root / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", root)
    for diff in papers.blocks(TEXT, "diff"):
        papers.apply(diff, root)
    for recipe in papers.blocks(TEXT, "yaml"):
        (root / recipe.partition("\n")[0].removeprefix("# ")).write_text(recipe)
    for name, module in MODULES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(module.partition("\n")[2])
    for title, text in sections().items():
        if programs := [block for block in papers.blocks(text, "python") if block not in MODULES.values()]:
            name = title.lower().replace(" ", "_")
            # Blocks of one section go on from each other.
            (root / f"{name}.py").write_text("\n\n".join(programs))
    return root


def test_its_examples_run_where_its_changes_were_made(copy: Path) -> None:
    programs = sorted(str(path) for path in copy.glob("add_*.py"))
    assert len(programs) == sum("```python" in text for text in sections().values()) >= 4
    assert papers.commands(sections()["Add a recipe"]) == [PLAN]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *programs, *PLAN.split()[1:]],
        cwd=copy,
        env={**os.environ, **PROCESS, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "masks a sample" in done.stdout, "the recipe that was added is planned"


LIFE = """
import sys
from d2v_scale.train import main as train
from d2v_scale.command_line import parse
from d2v_scale.commands import draw, export, plan
from d2v_scale.errors import ConfigError
from d2v_scale.process.signals import StopFlag

shards, *recipe = sys.argv[1:]
try:
    parse([*recipe, "--objective.log_mel.loss.scale", "0"])[0].check(1)
except ConfigError as error:
    print(error)
planned = plan.main([*recipe, "--nodes", "1", "--gpus", "1", "--device", "h100"])
sets = f"--data {shards} --evaluation.train {shards} --evaluation.test {shards} --run_dir run --stop_at 2".split()
trained = train([*recipe, *sets], StopFlag.install())
drawn = draw.main(["run", "--samples", "12"])
refused = [export.main(["run", f"as_{to}", "--to", to]) for to in ("hf", "fairseq")]
saved = export.main(["run", "as_safetensors", "--to", "safetensors"])
print("CODES", planned, trained, drawn, *refused, saved)
"""


def test_the_modality_that_it_adds_is_planned_trained_drawn_and_exported(copy: Path) -> None:
    write_set(copy / "sounds", "a", "recording", sound_samples(24, seconds=(0.5, 1.0)), per_shard=12, measure=measure)
    shards = str(copy / "sounds" / "a.index.json")
    [test] = [block for block in papers.blocks(sections()["Add a modality"], "python") if block not in MODULES.values()]
    options = " ".join(re.findall(r'^(?:STEM|MASKS) = "(.*)"', test, re.MULTILINE)).split()
    sizes = "--global_batch_size 8 --data.workers 0 --evaluation.max_train 12 --evaluation.max_test 12"
    done = subprocess.run(
        [sys.executable, "-c", LIFE, shards, "--recipe", "tiny2_speech", *options, *sizes.split()],
        cwd=copy,
        env={**os.environ, **PROCESS, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "CODES 0 0 0 2 2 0" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "objective.log_mel.loss.scale: is 0" in done.stdout
    for library in ("transformers has no class for", "the reference has no model of"):
        assert f"{library} log_mel" in done.stderr
    assert "masks a sample" in done.stdout, "it is planned"
    names = set(load_file(copy / "as_safetensors" / "model.safetensors"))
    assert {"stems.log_mel.features.patch.weight", "stems.log_mel.context.norm.weight"} <= names
    assert {path.name for path in (copy / "run" / "plots").iterdir()} >= {"masks.png", "similarity.png"}


def test_its_examples_pass_the_lint(copy: Path) -> None:
    changed = [*re.findall(r"^--- (\S+)", TEXT, re.MULTILINE), *MODULES]
    examples = [path.name for path in copy.glob("add_*.py")]
    # A section's blocks are one program here: imports stand where their block begins.
    command = [sys.executable, "-m", "ruff", "check", "--ignore", "E402,I001", *changed, *examples]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_diff_that_does_not_fit_is_refused() -> None:
    assert papers.edited("a\nb\nc\n", " a\n-b\n+d\n") == "a\nd\nc\n"
    with pytest.raises(AssertionError, match="0 times"):
        papers.edited("a\n", "-b\n+c\n")
