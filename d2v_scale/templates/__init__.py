"""Files that people start from: `ds_configs/`, `slurm/` and the recipes.

In a clone the first two lie beside the package, in an installed package within this folder; setup.py maps them there.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDERS = {
    "ds_configs": "DeepSpeed configurations",
    "slurm": "templates for Slurm",
    "recipes": "recipes",
}


def root() -> Path:
    """The folder that holds `ds_configs/` and `slurm/`."""
    installed = Path(__file__).resolve().parent
    return installed if (installed / "ds_configs").is_dir() else _PACKAGE.parent


def folder(name: str) -> Path:
    """Where `ds_configs`, `slurm` or `recipes` lies."""
    return _PACKAGE / name if name == "recipes" else root() / name


def deepspeed_config(path: str | Path) -> Path:
    """`path` itself, or the packaged file where it begins with `ds_configs/` and there is none in this folder."""
    given = Path(path)
    packaged = root() / path
    is_ours = len(given.parts) == 2 and given.parts[0] == "ds_configs"
    return packaged if is_ours and not given.exists() and packaged.is_file() else given
