"""slurm/lib.sh without Slurm: stand-ins for `srun` and the container runtime write down how they were called."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

RECORD = f"""#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
call = {{"program": os.path.basename(sys.argv[0]), "words": words, "env": dict(os.environ)}}
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(call) + "\\n")
"""
STAND_INS = {
    "scontrol": 'case "$*" in *hostnames*) echo n1;; *node*) echo "NodeName=n1 NodeAddr=127.0.0.1";; esac',
    "srun": RECORD
    + """
while words[0].startswith("--"):
    del words[0]
os.environ |= {"SLURMD_NODENAME": "n1", "SLURM_NODEID": "0"}
if any(word.startswith("--container-image") for word in sys.argv):
    os.environ["PATH"] = os.environ["IN_IMAGE"]
os.execvp(words[0], words)
""",
    "apptainer": RECORD
    + """
image = next(i for i, word in enumerate(words) if word.endswith(".sif"))
os.environ["PATH"] = os.environ["IN_IMAGE"]
os.execvp(words[image + 1], words[image + 1:])
""",
}
IN_IMAGE = {
    "deepspeed": RECORD
    + """
run_dir = words[words.index("--run_dir") + 1]
json.dump({"outcome": "done", "exit_code": 0, "reason": "all steps done"}, open(f"{run_dir}/status.json", "w"))
""",
    "python": f"""
[[ "$*" != *" train --meet "* ]] || {{ echo "$@" >> "${{CALLS%/*}}/train"; exit 0; }}
[[ $1 != */probe.py && ${{3:-}} != probe ]] || exit 0
exec {sys.executable} "$@"
""",
}


class Site:
    """A cluster of one node, as the batch shell sees it."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.repository = directory / "my repository"
        for name in ("d2v_scale", "ds_configs", "slurm", "tools"):
            shutil.copytree(REPOSITORY / name, self.repository / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / "pyproject.toml", self.repository)
        for folder, programs in (("host", STAND_INS), ("image", IN_IMAGE)):
            (directory / folder).mkdir()
            for name, text in programs.items():
                program = directory / folder / name
                program.write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
                program.chmod(0o755)
        (directory / "runs").mkdir()
        (directory / "shards").mkdir()

    def train(self, *arguments: str, python_on_host: bool = True, **settings: str) -> subprocess.CompletedProcess[str]:
        """What a template does."""
        environment = self._environment() | settings
        if not python_on_host:
            environment["PATH"] = self._without_python(environment["PATH"].partition(":")[2])
        script = 'repository=$1; source "$1/slurm/lib.sh"; train demo_vision zero1.json "${@:2}"'
        command = ["bash", "-c", script, "_", str(self.repository), *arguments]
        return subprocess.run(command, env=environment, cwd=self.dir, capture_output=True, text=True, timeout=120)

    def _environment(self) -> dict[str, str]:
        path = f"{self.dir}/host:/usr/sbin:/usr/bin:/sbin:/bin"
        return {
            "PATH": f"{self.dir}/image:{path}",
            "IN_IMAGE": f"{self.dir}/image:{path}",
            "CALLS": str(self.dir / "calls"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NAME": "test",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NNODES": "1",
            "SLURM_CPUS_ON_NODE": "2",
            "SLURM_SUBMIT_DIR": str(self.dir),
            "D2V_SCALE_RANKS_PER_NODE": "2",
            "D2V_SCALE_PREFLIGHT": "0",
            "D2V_SCALE_RUNS": str(self.dir / "runs"),
        }

    def run_once(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """What slurm/eval.sh does."""
        script = 'repository=$1; source "$1/slurm/lib.sh"; run_once "${@:2}"'
        command = ["bash", "-c", script, "_", str(self.repository), *words]
        environment = self._environment() | settings
        return subprocess.run(command, env=environment, cwd=self.dir, capture_output=True, text=True, timeout=120)

    def _without_python(self, path: str) -> str:
        """The programs of `path` but for any Python."""
        folder = self.dir / "no python"
        folder.mkdir()
        for one in reversed(path.split(":")):
            for program in Path(one).iterdir():
                link = folder / program.name
                link.unlink(missing_ok=True)
                if not program.name.startswith("python"):
                    link.symlink_to(program)
        return str(folder)

    def calls(self, program: str) -> list[dict[str, Any]]:
        lines = (self.dir / "calls").read_text().splitlines() if (self.dir / "calls").exists() else []
        return [call for line in lines if (call := json.loads(line))["program"] == program]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_ranks_get_the_environment_of_the_job_whatever_sbatch_exported(site: Site) -> None:
    """`sbatch --export=LIST` leaves SLURM_EXPORT_ENV, by which `srun` gives the ranks next to nothing."""
    left = {"WORLD_SIZE": "8", "RANK": "3", "LOCAL_RANK": "3"}
    done = site.train("--seed=1", SLURM_EXPORT_ENV="D2V_SCALE_ACTIVATE", **left)
    assert done.returncode == 0, done.stdout + done.stderr
    (step,) = site.calls("srun")
    assert "--export=ALL" in step["words"]
    (launcher,) = site.calls("deepspeed")
    assert not left.keys() & launcher["env"].keys(), "left in the shell that submitted"
    assert not any(word.startswith("--container") for word in step["words"])
    run_dir = site.dir / "runs" / "test-7"
    assert launcher["env"]["PYTHONPATH"].split(":")[0] == str(run_dir / "code/7")


def test_a_port_that_is_taken_is_passed_over(site: Site) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 20098))  # of job 7
        listener.listen()
        done = site.train("--seed=1")
    assert "port 20098 is taken" in done.stdout
    (launcher,) = site.calls("deepspeed")
    assert launcher["words"][launcher["words"].index("--master_port") + 1] == "20100"


def test_restarts_are_the_launchers_which_meet_in_the_run_directory(site: Site) -> None:
    done = site.train("--spares=1", "--seed=1", "--restarts", "4", SLURM_NNODES="2", SLURM_JOB_NODELIST="n1")
    assert done.returncode == 14, "the stand-in for the launcher trains nothing"
    assert "1 of the nodes wait" in done.stdout
    (step,) = site.calls("srun")
    assert {"--no-kill", "--wait=0", "--kill-on-bad-exit=0"} <= {*step["words"]}
    assert not site.calls("deepspeed")
    logs = site.dir / "runs/test-7/logs/7-0"
    assert (logs / "meet/nodes").read_text().split() == ["n1", "127.0.0.1"]
    (started,) = (site.dir / "train").read_text().splitlines()
    begun = f"-m d2v_scale train --meet {logs}/meet --ranks 2 --restarts 4 --spares 1 --node n1 --seed=1 --run_dir"
    assert started.startswith(begun)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--spares", "1"], "the job has 1 nodes, and one has to train"),
        (["--spares=x"], "give numbers"),
        (["--seed=1", "--spares"], "--spares is the last word: give a number behind it"),
        (["--spares=1", "--restarts"], "--restarts is the last word: give a number behind it"),
        (["--restarts=-1"], "give numbers"),
        (["--spares=1", "--restarts=0"], "takes its place in a restart"),
    ],
)
def test_spares_and_restarts_that_cannot_be_are_refused(site: Site, arguments: list[str], says: str) -> None:
    done = site.train(*arguments, SLURM_NNODES="1" if "has 1" in says else "2")
    assert done.returncode == 2
    assert says in done.stdout


DATA = "vision={}/shards/a-{{0..9}}.tar,text=/usr/share/[ab]*.tar"


def test_pyxis(site: Site) -> None:
    settings = {"D2V_SCALE_CONTAINER": "pyxis:nvcr.io#lab/d2v:2", "D2V_SCALE_CONTAINER_MOUNTS": "/scratch,/a:/b:ro"}
    done = site.train("--data", DATA.format(site.dir), **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (step,) = site.calls("srun")
    assert "--container-image=nvcr.io#lab/d2v:2" in step["words"]
    assert f"--container-workdir={site.dir}" in step["words"]
    (mounts,) = [word.partition("=")[2] for word in step["words"] if word.startswith("--container-mounts=")]
    # Repository and run directory lie in it.
    assert mounts.split(",") == [f"{site.dir}:{site.dir}", "/usr/share:/usr/share", "/scratch:/scratch", "/a:/b:ro"]
    (launcher,) = site.calls("deepspeed")
    assert launcher["env"]["PYTHONPATH"] == str(site.dir / "runs/test-7/code/7")
    assert "stop" in done.stdout


@pytest.mark.parametrize("accelerator", ["", "cpu"])
def test_apptainer(site: Site, accelerator: str) -> None:
    elsewhere = site.dir.parent / f"{site.dir.name} elsewhere"
    elsewhere.mkdir()
    (elsewhere / "recipe.yaml").touch()
    settings = {"D2V_SCALE_CONTAINER": "apptainer:/images/d2v.sif", "D2V_SCALE_CONTAINER_MOUNTS": "/scratch"}
    if accelerator:
        settings["DS_ACCELERATOR"] = accelerator
    arguments = (f"--init_from={elsewhere}/recipe.yaml", "--data", "../nowhere/*.tar")
    done = site.train(*arguments, SLURM_SUBMIT_DIR=str(site.dir / "shards"), **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (call,) = site.calls("apptainer")
    words = call["words"]
    assert words[:3] == ["exec", "--pwd", str(site.dir)]
    bound = words[words.index("--bind") + 1].split(",")
    expected = {str(elsewhere), str(site.repository), str(site.dir / "runs"), str(site.dir / "shards"), "/scratch"}
    assert set(bound) == expected
    assert len(bound) == len(expected)
    assert ("--nv" in words) == (accelerator == "")
    assert words[words.index("/images/d2v.sif") + 1] == "env"
    (launcher,) = site.calls("deepspeed")
    assert f"--init_from={elsewhere}/recipe.yaml" in launcher["words"], "a path with a space arrives whole"


@pytest.mark.parametrize("container", ["apptainer:/images/d2v.sif", "pyxis:lab/d2v"])
def test_a_host_without_python_uses_that_of_the_image(site: Site, container: str) -> None:
    done = site.train("--seed=1", python_on_host=False, D2V_SCALE_CONTAINER=container)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended with exit code 0: stop" in done.stdout
    used = site.calls("apptainer" if container.startswith("apptainer") else "srun")
    assert "d2v_scale.running.attempts" in used[-1]["words"]
    assert json.loads((site.dir / "runs/test-7/attempts.jsonl").read_text())["exit_code"] == 0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"D2V_SCALE_CONTAINER": "/images/d2v.sif"}, "neither pyxis:IMAGE nor apptainer:IMAGE"),
        ({"D2V_SCALE_CONTAINER": "docker:x"}, "neither pyxis:IMAGE nor apptainer:IMAGE"),
        ({"D2V_SCALE_CONTAINER": "pyxis:"}, "neither pyxis:IMAGE nor apptainer:IMAGE"),
        ({"D2V_SCALE_CONTAINER": "pyxis:x", "D2V_SCALE_RUN_IN": "apptainer exec y"}, "not both"),
        ({"D2V_SCALE_CONTAINER": "pyxis:x", "D2V_SCALE_RUNS": "a,b"}, "may hold neither , nor :"),
    ],
)
def test_a_container_setting_that_cannot_be_is_refused(site: Site, settings: dict[str, str], says: str) -> None:
    done = site.train("--seed=1", **settings)
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stdout
    assert site.calls("srun") == []


def test_folders_are_for_whom_the_umask_says(site: Site) -> None:
    before = os.umask(0o002)
    try:
        assert site.train("--seed=1").returncode == 0
    finally:
        os.umask(before)
    assert (site.dir / "runs/test-7/code/7").stat().st_mode & 0o777 == 0o775


def test_an_evaluation_runs_in_the_container_too(site: Site) -> None:
    given = ("probe.py", str(site.dir / "runs"), "--data", str(site.dir / "shards/[ab].tar"), "--out", "a b")
    done = site.run_once(*given, D2V_SCALE_CONTAINER="apptainer:/images/d2v.sif", LOCAL_RANK="3")
    (call,) = site.calls("apptainer")
    assert call["words"][-6:] == [str(site.repository / "tools/probe.py"), *given[1:]], done.stdout + done.stderr
    assert str(site.dir) in call["words"][call["words"].index("--bind") + 1].split(",")
    assert "LOCAL_RANK" not in call["env"]
    assert "--export=ALL" in site.calls("srun")[0]["words"]


def laid_out(site: Site) -> None:
    """What `d2v templates` makes: no package, no tools."""
    for name in ("d2v_scale", "tools"):
        shutil.rmtree(site.repository / name)
    (site.repository / "pyproject.toml").unlink()


def test_templates_that_were_laid_out_run_the_installed_package(site: Site) -> None:
    laid_out(site)
    (site.repository / "ds_configs" / "zero1.json").write_text('{"mine": 1}')
    done = site.train("--seed=1", PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stdout + done.stderr
    code = site.dir / "runs/test-7/code/7"
    assert (code / "d2v_scale" / "train.py").read_bytes() == (REPOSITORY / "d2v_scale" / "train.py").read_bytes()
    (call,) = site.calls("deepspeed")
    assert str(code / "d2v_scale/train.py") in call["words"]
    assert call["words"][call["words"].index("--deepspeed_config") + 1] == str(code / "ds_configs/zero1.json")
    assert (code / "ds_configs/zero1.json").read_text() == '{"mine": 1}'
    given = [str(site.dir / "runs"), "--task", "linear"]
    site.run_once("probe.py", *given, D2V_SCALE_CONTAINER="apptainer:/images/d2v.sif")
    assert site.calls("apptainer")[-1]["words"][-6:] == ["-m", "d2v_scale", "probe", *given]


def test_templates_without_an_installed_package_say_so(site: Site) -> None:
    laid_out(site)
    (site.dir / "image" / "python").write_text("#!/bin/bash\nexit 1\n")
    done = site.train("--seed=1")
    assert done.returncode == 2
    assert "no d2v_scale in" in done.stdout
