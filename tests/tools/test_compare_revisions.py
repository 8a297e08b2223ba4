"""The comparison of revisions, on a tiny pair: what is equal, what was added, and what differs, in every part of it."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

TRAIN = """
import argparse, json, os, pathlib, sys
import yaml

KEYS = {"name": "demo_vision", "lr": 0.1}
REFUSED = 2
SHIFT = 0.0
METRICS = {}
FORMAT = 1

parser = argparse.ArgumentParser()
for name in ("recipe", "run_dir", "resume", "deepspeed_config", "data", "optim.lr", "model.vision.patch_size"):
    parser.add_argument(f"--{name}")
parser.add_argument("--stop_at", type=int, default=4)
parser.add_argument("--checkpoint.every", type=int, default=0, dest="every")
parser.add_argument("--print_config", action="store_true")
options, _ = parser.parse_known_args()
if options.print_config:
    print(yaml.safe_dump(KEYS, sort_keys=False))
    sys.exit(0)
if options.recipe != "demo_vision" and options.resume is None:
    print("error: no such recipe")
    sys.exit(REFUSED)
if os.environ.get("RANK", "0") != "0":
    sys.exit(0)
folder = pathlib.Path(options.resume or options.run_dir)
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
saved = sorted((folder / "checkpoints").glob("step-*"))
step, format_ = json.loads((saved[-1] / "state.json").read_text()) if saved else (0, FORMAT)
if format_ != FORMAT:
    print("error: of another format")
    sys.exit(1)
with (folder / "metrics.jsonl").open("a") as file:
    while step < options.stop_at:
        step += 1
        loss = 1 / step + (SHIFT if step > 2 else 0.0)
        measured = {"step_seconds": id(file), "pipeline_idle/stage_0": 1 / os.getpid()}
        print(json.dumps({"step": step, "loss": loss, **measured, **METRICS}), file=file)
        if step == options.stop_at or (options.every and step % options.every == 0):
            target = folder / "checkpoints" / f"step-{step:08d}"
            target.mkdir()
            (target / "state.json").write_text(json.dumps([step, FORMAT]))
"""
CHECKPOINT = """
import json, pathlib
import numpy

class Tensor:
    def __init__(self, value): self.value = value
    def numpy(self): return numpy.asarray(self.value, dtype="float32")

class Opened:
    def __init__(self, path):
        step, _ = json.loads((sorted(pathlib.Path(path, "checkpoints").glob("step-*"))[-1] / "state.json").read_text())
        self.held = {"w": step}
    def kinds(self): return ["student"]
    def names(self, kind): return list(self.held)
    def tensor(self, kind, name): return Tensor(self.held[name])

open_any = Opened
"""
MAKE_SHARDS = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("kind"); parser.add_argument("--modality"); parser.add_argument("out")
options = parser.parse_args()
target = pathlib.Path(options.out, options.modality)
target.mkdir(parents=True, exist_ok=True)
(target / "test.index.json").write_text('{"samples": 3}')
if __name__ == "__main__":
    pass
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of one commit with the public programs of this one, in small."""
    root = tmp_path / "tree"
    (root / "tools").mkdir(parents=True)
    (root / "d2v_scale" / "recipes").mkdir(parents=True)
    (root / "d2v_scale" / "__init__.py").touch()
    (root / "d2v_scale" / "train.py").write_text(TRAIN)
    (root / "d2v_scale" / "checkpoint.py").write_text(CHECKPOINT)
    (root / "tools" / "export.py").touch()
    (root / "d2v_scale" / "recipes" / "demo_vision.yaml").write_text("shards: demo_data/vision/train.index.json\n")
    (root / "tools" / "make_shards.py").write_text(MAKE_SHARDS)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    commit(root, "First")
    return root


def commit(tree: Path, message: str) -> None:
    for command in (("add", "-A"), ("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", message)):
        subprocess.run(["git", *command], cwd=tree, check=True)


def change(tree: Path, old: str, new: str, file: str = "d2v_scale/train.py") -> None:
    text = (tree / file).read_text()
    assert old in text
    (tree / file).write_text(text.replace(old, new))


def compare(tree: Path, *arguments: str) -> tuple[int, dict[tuple[str, str], str]]:
    """Exit code, and the table: result by comparison and name. No worktree is left."""
    command = [sys.executable, str(TOOLS / "compare_revisions.py"), *arguments, "--tree", str(tree)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    listed = subprocess.run(["git", "worktree", "list"], cwd=tree, capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) == 1, ended.stderr
    rows = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines()[2:]]
    return ended.returncode, {(kind, name): result for kind, name, result in rows}


PARTS = ("files", "options", "recipes", "refusals", "shards", "losses", "checkpoints")


def test_a_tree_equals_its_own_commit(tree: Path) -> None:
    code, found = compare(tree, "HEAD", "--only", *PARTS)
    assert code == 0
    assert set(found.values()) == {"equal"}
    kinds = {"files", "options", "recipes", "refusals", "shards", "losses", "last checkpoint", "files of a run"}
    assert {kind for kind, _ in found} == kinds | {"checkpoints"}
    both = "ZeRO-1: losses, ZeRO-1: next checkpoint, pipeline: losses, pipeline: next checkpoint"
    assert [name for kind, name in found if kind == "checkpoints"] == [both]


def test_additions_are_told_and_are_no_difference(tree: Path) -> None:
    change(tree, '"lr": 0.1', '"lr": 0.1, "eps": 0')
    change(tree, '"data", ', '"data", "seed", ')
    change(tree, "METRICS = {}", 'METRICS = {"margin": 1.0}')
    code, found = compare(tree, "HEAD", "--only", "options", "recipes", "losses")
    assert code == 0
    assert found["recipes", "demo_vision"] == "added: eps"
    assert found["options", "d2v_scale/train.py"] == "added: --seed"
    assert found["losses", "demo_vision"] == "added: margin"


def test_every_difference_is_told(tree: Path) -> None:
    change(tree, "SHIFT = 0.0", "SHIFT = 1e-16")
    change(tree, '"lr": 0.1', '"rate": 0.1')
    change(tree, "REFUSED = 2", "REFUSED = 3")
    change(tree, "FORMAT = 1", "FORMAT = 2")
    change(tree, '"data", ', "")
    change(tree, '"samples": 3', '"samples": 4', "tools/make_shards.py")
    (tree / "tools" / "export.py").rename(tree / "tools" / "write_export.py")
    code, found = compare(tree, "HEAD", "--only", *PARTS, "--steps", "3")
    assert code == 1
    files = found["files", "tools, slurm, ds_configs, d2v_scale/recipes, d2v_scale/train.py"]
    assert files == "DIFFERS: without tools/export.py; with tools/write_export.py"
    assert found["options", "d2v_scale/train.py"] == "DIFFERS: without --data"
    assert found["recipes", "demo_vision"] == "DIFFERS: without lr; with rate"
    assert "DIFFERS: exit code (2 -> 3)" in [result for (kind, _), result in found.items() if kind == "refusals"]
    assert found["shards", "vision"] == "DIFFERS: test.index.json: samples"
    assert found["losses", "demo_vision"].startswith("DIFFERS: loss from step 3 (0.333333")
    assert found["last checkpoint", "demo_vision"] == "equal"
    refused = "DIFFERS: cannot be continued, exit code 1: error: of another format"
    assert found["checkpoints", "ZeRO-1, pipeline"] == refused


def test_what_no_two_calls_make_alike_is_given_to_both(tree: Path) -> None:
    change(tree, '"samples": 3', '"noise": \' + str(os.getpid()) + \', "samples": 3', "tools/make_shards.py")
    change(tree, "import argparse", "import argparse, os", "tools/make_shards.py")
    change(tree, "loss = 1 / step", 'loss = len(pathlib.Path("demo_data/vision/test.index.json").read_text()) / step')
    commit(tree, "Second")
    code, found = compare(tree, "HEAD", "--only", "shards", "losses")
    assert code == 0
    assert found["shards", "vision"] == "equal but for 1 of 2, which the revision makes anew each time"
    assert found["losses", "demo_vision"] == "equal"
    change(tree, '"samples": 3', '"samples": 4', "tools/make_shards.py")
    code, found = compare(tree, "HEAD", "--only", "shards", "losses")
    assert code == 1
    assert found["shards", "vision"].startswith("DIFFERS: test.index.json: samples but for 1 of 2")
    assert found["losses", "demo_vision"] == "equal"


def test_what_neither_can_do_was_not_compared(tree: Path) -> None:
    (tree / "tools" / "make_shards.py").write_text("import sys\nsys.exit('no voices here')\n")
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "Second"], cwd=tree, check=True
    )
    code, found = compare(tree, "HEAD", "--only", "shards")
    assert (code, found) == (0, {("shards", "vision"): "not compared: both end with 1: no voices here"})


def test_a_revision_that_is_not_there_or_does_not_start_is_refused(tree: Path) -> None:
    assert compare(tree, "no_such_revision")[0] == 2
    assert compare(tree, "HEAD", "--only", "losses", "--demos", "another") == (0, {})
    (tree / "d2v_scale" / "train.py").write_text("import no_such_module\n")
    assert compare(tree, "HEAD", "--only", "recipes")[0] == 2
