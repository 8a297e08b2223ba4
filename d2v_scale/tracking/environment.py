"""Where and with what a run runs: tags for comparing runs, and the full list for reproducing one."""

import getpass
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

from d2v_scale.redaction import redact, redact_values

_ROOT = Path(__file__).resolve().parents[2]
_VERSIONS = ("torch", "deepspeed", "megatron-core", "webdataset", "d2v_scale")
_SLURM = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_NAME", "JOB_NODELIST", "JOB_PARTITION", "NNODES")


def environment_tags() -> dict[str, str]:
    """Git revision, versions, host and Slurm ids. The caller adds the topology, `RunTracker` the restarts."""
    tags = {f"version.{name}": version(name) for name in _VERSIONS}
    tags |= {"version.python": platform.python_version(), "host": platform.node(), "git.revision": git_revision()}
    tags |= {f"slurm.{name.lower()}": os.environ[f"SLURM_{name}"] for name in _SLURM if f"SLURM_{name}" in os.environ}
    return tags


def origin() -> dict[str, str]:
    """Who started a run and with what, under the names of MLflow's own columns."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        user = str(os.getuid())
    tags = {"mlflow.user": user, "mlflow.source.name": redact(" ".join(["d2v train", *sys.argv[1:]]))[:500]}
    revision = git_revision().removesuffix("-dirty")
    return tags | ({"mlflow.source.git.commit": revision} if revision != "unknown" else {})


def git_revision(root: Path = _ROOT) -> str:
    """Commit of the source tree, with `-dirty` if tracked files differ; `unknown` for an installed package.

    Of a Slurm job's copy of the tree: as its file REVISION has it (`slurm/lib.sh`).
    """
    try:
        if (root / "REVISION").exists():
            commit, *changed = (root / "REVISION").read_text().splitlines()
            return commit[:12] + ("-dirty" if any(not line.startswith("??") for line in changed) else "")
        if not (root / ".git").exists():
            return "unknown"
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"


def write_environment(run_dir: Path) -> Path:
    """environment.json in the run directory: command line, installed packages, devices. Returns its path."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    content = {
        "command": redact_values(sys.argv),
        "tags": environment_tags(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "devices": devices,
        "cuda": torch.version.cuda,
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions())),
    }
    path = run_dir / "environment.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
