"""Whether the PyTorch found here can measure anything: `python -m d2v_scale.benchmarks.device_torch [--any_device]`.

Asked before anything is installed or unpacked, since minutes on a GPU are few. Needs nothing but PyTorch. Prints one
line with what was found, or one sentence for what is wrong; the exit code is then 2.
"""

import importlib
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d2v_scale.errors import EXIT_BAD_INPUT


def wanted() -> str:
    """The line of pyproject.toml, as `torch>=2.11,<2.14`."""
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    return next(line for line in tomllib.loads(text)["project"]["dependencies"] if line.startswith("torch>"))


def is_wanted(version: str) -> bool:
    """Whether this version is within the bounds of `wanted`. Only major and minor number count, as in the bounds."""
    found = _numbers(version)
    low, _, high = wanted().removeprefix("torch>=").partition(",<")
    return _numbers(low) <= found < _numbers(high)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def problem(*, any_device: bool) -> str | None:
    """One sentence, with the remedy; None where nothing is wrong. `any_device`: a CPU is good enough."""
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:
        return f"PyTorch cannot be imported ({type(error).__name__}: {error}): install {wanted()} with CUDA"
    if not is_wanted(torch.__version__):
        return f"PyTorch is {torch.__version__}: install {wanted()} with CUDA"
    if any_device:
        return None
    if torch.version.cuda is None:
        return (
            f"PyTorch {torch.__version__} was built without CUDA: install a build with it, or rehearse with --dry_run"
        )
    if not torch.cuda.is_available():
        return (
            f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU: see what nvidia-smi says of the "
            "driver, or rehearse with --dry_run"
        )
    try:
        x = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
        right = float((x @ x).sum()) == 256**3
    except Exception as error:
        name = torch.cuda.get_device_name()
        return f"{name} cannot multiply in bf16 with PyTorch {torch.__version__} ({error}): install a build for it"
    return None if right else f"{torch.cuda.get_device_name()} multiplies wrongly: do not measure on it"


def found(torch: Any) -> str:
    """One line: version, CUDA, cuDNN, device and its capability."""
    parts = [f"PyTorch {torch.__version__}"]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        parts += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
        parts.append(f"{torch.cuda.get_device_name()} (sm_{major}{minor})")
    else:
        parts.append("no GPU")
    return ", ".join(parts)


def main(arguments: Sequence[str]) -> int:
    """Print what was found or what is wrong; returns the exit code."""
    wrong = problem(any_device="--any_device" in arguments)
    if wrong is not None:
        print(f"error: {wrong}.", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(found(importlib.import_module("torch")), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
