"""The oldest and the newest packages that the tests pass with, as constraints for pip: `constraints/*.txt`.

    python tools/constraints.py newest      # what is installed here, of everything that the project and its tests need
    python tools/constraints.py oldest      # the lowest version that pyproject.toml allows of each (asks uv)

Run the tests with a set before it is kept: `pip install -c constraints/oldest.txt -e '.[demo,test]'`.
"""

import argparse
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "constraints"
EXTRAS = ("demo", "test")
HEADS = {
    "newest": "# The newest packages that the tests pass with. Made by tools/constraints.py; see docs/cluster.md.",
    "oldest": "# The oldest packages that pyproject.toml allows. Made by tools/constraints.py; see docs/cluster.md.",
}
ONLY_WITH_CUDA = re.compile(r"(nvidia-(?!ml-py)|triton|cuda-)")
"""What torch's CUDA build brings by itself, in the versions that it was built with."""


def wanted() -> list[Requirement]:
    """What pyproject.toml asks for, with the extras that the tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in (*project["dependencies"], *optional)]


def installed() -> dict[str, str]:
    """The version here of everything that is needed, and of what that needs, and so on."""
    found: dict[str, str] = {}
    waiting = [(one, frozenset(one.extras)) for one in wanted()]
    seen = set()
    while waiting:
        requirement, extras = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, extras) in seen or ONLY_WITH_CUDA.match(name):
            continue
        seen.add((name, extras))
        try:
            one = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform
        found[name] = one.version.partition("+")[0]
        for line in one.requires or ():
            below = Requirement(line)
            marker = below.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
                waiting.append((below, frozenset(below.extras)))
    return found


def lowest() -> dict[str, str]:
    """The lowest allowed version of each, and the newest of what else these need. Asks uv, which must be there."""
    command = [
        "uv",
        "pip",
        "compile",
        "pyproject.toml",
        "--resolution",
        "lowest-direct",
        "--no-header",
        "--no-annotate",
    ]
    command += [word for extra in EXTRAS for word in ("--extra", extra)]
    done = subprocess.run(
        [*command, "--python-version", "3.11"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    pairs = [line.split(" ")[0].split("==") for line in done.stdout.splitlines() if "==" in line]
    return {name: version for name, version in pairs if not ONLY_WITH_CUDA.match(name)}


def main() -> int:
    """Write one set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=[*HEADS], help="which")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    options = parser.parse_args()
    found = installed() if options.set == "newest" else lowest()
    lines = sorted(f"{name}=={version}" for name, version in found.items())
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.set}.txt"
    path.write_text("\n".join([HEADS[options.set], *lines]) + "\n")
    print(f"{path}: {len(lines)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
