"""What is installed: everything a clone has for use, from one source, and it works in a folder that is no clone."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from launch import PROCESS

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = {"ds_configs": "d2v_scale/templates/ds_configs", "slurm": "d2v_scale/templates/slurm"}
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]
for build in (build_meta.build_sdist, build_meta.build_wheel):
    build(out)
"""


def tracked(name: str) -> dict[str, bytes]:
    """The files of a folder of the tree that belong to it, by path."""
    ours = {".py", ".yaml", ".json", ".md", ".sh", ".bash", ".example", ".js", ".css"}
    bare = {"py.typed", "LICENSE", "sha256sums"}
    files = (path for path in (ROOT / name).rglob("*") if path.suffix in ours or path.name in bare)
    return {str(path.relative_to(ROOT)): path.read_bytes() for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist of this tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("d2v_scale", "ds_configs", "slurm"):
        ignore = shutil.ignore_patterns("__pycache__", "site.env")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "slurm" / "site.env").write_text("export SECRET=1\n")
    command = [sys.executable, "-W", "ignore", "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_wheel_and_sdist_hold_what_the_tree_holds_and_once(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("d2v_scale/")]
        in_wheel = {name: archive.read(name) for name in names}
        points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "d2v = d2v_scale.commands.verbs:main" in archive.read(points).decode()
        licences = [name for name in archive.namelist() if "/licenses/" in name and name.endswith("LICENSE")]
        assert len(licences) == 2, licences  # the project's, uPlot's
    assert len(names) == len(in_wheel)
    package = tracked("d2v_scale")
    expected = dict(package)
    for folder, place in TEMPLATES.items():
        expected |= {name.replace(folder, place, 1): content for name, content in tracked(folder).items()}
    assert sorted(in_wheel) == sorted(expected)
    assert in_wheel == expected
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive if member.isfile()}
        for name, content in {**package, **tracked("ds_configs"), **tracked("slurm")}.items():
            stream = archive.extractfile(members[name])
            assert stream is not None
            assert stream.read() == content, name
    assert not any("site.env" in name and "example" not in name for name in (*in_wheel, *members))


class Installed:
    """The wheel in a prefix of its own over this environment's packages, and an empty folder to work in."""

    def __init__(self, wheel: Path, directory: Path) -> None:
        prefix, self.folder = directory / "prefix", directory / "work"
        self.folder.mkdir()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
        options = ["--ignore-installed", "--no-warn-script-location", "--disable-pip-version-check"]
        subprocess.run([*command, *options, "--prefix", str(prefix), str(wheel)], check=True)
        self.packages = sysconfig.get_path("purelib", vars={"base": str(prefix), "platbase": str(prefix)})
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        path = f"{prefix / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.env = {**kept, **PROCESS, "PYTHONPATH": self.packages, "PATH": path, "D2V": str(prefix / "bin" / "d2v")}

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            words, cwd=self.folder, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *words: str, code: int = 0) -> str:
        process = self.start(*words)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == code, said[-3000:]
        return said


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(next(built.glob("*.whl")), tmp_path_factory.mktemp("installed"))


@pytest.mark.slow
def test_from_a_wheel_in_an_empty_folder(installed: Installed) -> None:
    """Shards, training on two processes, an export, a probe: nothing of the clone is used."""
    d2v = installed.env["D2V"]
    where = installed.run(sys.executable, "-c", "import d2v_scale; print(d2v_scale.__file__)").strip()
    assert Path(where).is_relative_to(installed.packages)
    assert "demo_data/vision" in installed.run(d2v, "shards", "demo", "--modality", "vision")
    training = ["--recipe", "demo_vision", "--optim.max_steps", "4", "--optim.warmup_steps", "1"]
    config = ["--deepspeed_config", "ds_configs/zero2.json"]
    said = installed.run(d2v, "train", "--ranks", "2", *training, *config, "--run_dir", "runs/a")
    assert "error" not in said.lower()
    status = json.loads((installed.folder / "runs/a/status.json").read_text())
    assert (status["outcome"], status["exit_code"]) == ("done", 0)
    assert "PASS" in installed.run(d2v, "export", "runs/a", "out/a")
    assert "mean of the last 4" in installed.run(d2v, "probe", "out/a", "--data", "demo_data/vision/train-*.tar",
        "--test", "demo_data/vision/test-*.tar", "--limit", "60")  # fmt: skip
    again = installed.run(
        sys.executable, "-m", "d2v_scale", "train", "--no_such_key=1", "--recipe", "demo_vision", code=2
    )
    assert "no_such_key" in again
    assert "ds_configs" in installed.run(d2v, "templates", "mine")
    zero1 = (installed.folder / "mine/ds_configs/zero1.json").read_bytes()
    assert zero1 == (ROOT / "ds_configs/zero1.json").read_bytes()
    assert "exists already" in installed.run(d2v, "templates", "mine", code=2)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_d2v_train_saves_and_ends_with_the_code_of_the_ranks(installed: Installed, number: int) -> None:
    run_dir = installed.folder / f"runs/{number}"
    keys = ["--recipe", "demo_vision", "--optim.max_steps", "100000", "--tracking.log_every", "1"]
    process = installed.start(installed.env["D2V"], "train", "--ranks", "2", *keys, "--run_dir", str(run_dir))
    limit = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").is_file() or '"loss"' not in (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < limit
        time.sleep(0.2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 10, said[-3000:]
    status = json.loads((run_dir / "status.json").read_text())
    assert signal.Signals(number).name in status["reason"]
    assert list((run_dir / "checkpoints").iterdir())
