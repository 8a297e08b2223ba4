"""Which packages there are; all else is in pyproject.toml.

`ds_configs/` and `slurm/` lie beside the package, where people look for them, and are installed within it.
"""

from setuptools import find_packages, setup

TEMPLATES = {f"d2v_scale.templates.{name}": name for name in ("ds_configs", "slurm")}

setup(packages=[*find_packages(include=["d2v_scale", "d2v_scale.*"]), *TEMPLATES], package_dir=TEMPLATES)
