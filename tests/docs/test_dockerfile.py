"""The lines of the Dockerfile, run in the order of an image in an environment of its own."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and what follows each, in order."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines]


def test_the_image_has_what_the_project_says_it_needs() -> None:
    found = instructions()
    assert found[0][0] == "FROM"
    assert {name for name, _ in found} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    [system] = [line for name, line in found if name == "RUN" and line.startswith("apt-get")]
    assert " g++ " in system
    copied = [word for name, line in found if name == "COPY" for word in line.split()[:-1]]
    assert [word for word in copied if not (ROOT / word).exists()] == []


def test_its_run_lines_install_a_program_that_works(tmp_path: Path) -> None:
    """All but those for the system, in an empty environment over this one's packages: nothing is downloaded."""
    pytest.importorskip("setuptools", minversion="77")
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    [packages] = (tmp_path / "env").glob("lib/python*/site-packages")
    ours = sysconfig.get_paths()["purelib"]
    # Not as a .pth file, whose own .pth files would bring the clone.
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")},
        "PATH": f"{tmp_path / 'env' / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # which means that there is none
        "PIP_NO_INDEX": "1",
    }
    (packages / "those_of_the_tests.pth").write_text(f"{ours}\n")
    place = tmp_path / "image"
    for name, line in instructions():
        if name == "WORKDIR":
            place = tmp_path / "image" / line.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = line.split()
            for source in sources:
                to = place / target / source if target == "./" else place / target
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__", "site.env"))
                else:
                    shutil.copy(ROOT / source, to)
        elif name == "RUN" and not line.startswith("apt-get"):
            done = subprocess.run(
                ["/bin/sh", "-c", line], cwd=place, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, (line, done.stdout[-1500:], done.stderr[-1500:])
    installed = subprocess.run(
        ["d2v", "--version"], cwd=place, env=environment, capture_output=True, text=True, check=True
    )
    assert installed.stdout.startswith("d2v_scale ")
    where = "import d2v_scale; print(d2v_scale.__file__)"
    found = subprocess.run(
        [tmp_path / "env/bin/python", "-c", where],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.startswith(str(packages)), "the copy in the image, not the clone"
    assert (tmp_path / "image/opt/d2v_scale/templates/slurm/lib.sh").is_file()
    assert sys.version_info[:2] >= (3, 11)
