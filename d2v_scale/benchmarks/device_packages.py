"""What `bench.py device` needs installed: `python -m d2v_scale.benchmarks.device_packages` names what is wrong.

With `--pins` it prints `name==version` of what is installed here, PyTorch and DeepSpeed aside, for `pip download`.
"""

import importlib
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from d2v_scale.errors import EXIT_BAD_INPUT

_NOT_NEEDED = {"torchaudio", "mlflow"}
_TESTS = ("pytest", "hypothesis")
_MODULES = ("deepspeed", "d2v_scale.benchmarks.device_case", "d2v_scale.data.loader")


def requirements() -> list[str]:
    """The lines of pyproject.toml that the benchmark depends on."""
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    project = tomllib.loads(text)["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = [line.partition(">")[0].partition("[")[0] for line in project["dependencies"]]
    wanted = {*names, *_TESTS} - _NOT_NEEDED
    return [line for line in lines if line.partition(">")[0].partition("[")[0] in wanted]


def pins() -> list[str]:
    """`name==version` of the requirements and of what they require in turn, as installed.

    Without PyTorch and what it brings, and without DeepSpeed, of which current versions have no wheel to download.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = {"torch": ""}

    def follow(requirement: Requirement) -> None:
        name = canonicalize_name(requirement.name)
        if name in found:
            return
        found[name] = metadata.version(name)
        for line in metadata.requires(name) or ():
            child = Requirement(line)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                follow(child)

    for line in requirements():
        follow(Requirement(line))
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name not in ("torch", "deepspeed")]


def problems() -> Iterator[str]:
    """One line for everything that is missing, of another version than pyproject.toml asks for, or does not import."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield "packaging is not installed"
        return
    sound = True
    for line in requirements():
        wanted = Requirement(line)
        if wanted.name in _TESTS:
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield f"{wanted.name} is not installed (wanted: {line})"
            sound = False
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield f"{wanted.name} is {version} (wanted: {line})"
            sound = False
    for module in _MODULES if sound else ():
        try:
            importlib.import_module(module)
        except Exception as error:
            yield f"{module} cannot be imported: {type(error).__name__}: {error}"


def main(arguments: list[str]) -> int:
    """Print the pins or the problems; returns the exit code."""
    if arguments == ["--pins"]:
        print("\n".join(pins()))
        return 0
    found = list(problems())
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_BAD_INPUT if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
