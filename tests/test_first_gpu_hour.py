"""Every command of docs/first_gpu_hour.md is one that the programs take, and every row that it reads exists."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from d2v_scale.benchmarks import device_rows

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/first_gpu_hour.md").read_text()
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines() if line]

# Options of tools/bench_gpu.sh, and whether a value follows.
SCRIPT = {"--out": True, "--only": True, "--wheels": True, "--minutes": True}
SCRIPT |= {"--list": False, "--tests": False, "--dry_run": False}


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 8


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_parses(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "bash":
        assert words.pop(0) == "tools/bench_gpu.sh"
        script = (ROOT / "tools/bench_gpu.sh").read_text()
        while words:
            option = words.pop(0)
            assert f"        {option})" in script, f"the script does not know {option}"
            value = words.pop(0) if SCRIPT[option] else ""
            if option == "--only":
                assert device_rows.select(value)
            if option == "--minutes":
                assert 0 < float(value) <= 9
        return
    assert program == "python"
    if words[0] == "-m":
        module, *rest = words[1:]
        importlib.import_module(module)
        assert all((ROOT / word).is_file() for word in rest if word.endswith(".py"))
        assert module == "pytest" or not rest
        return
    tool, benchmark, *rest = words
    assert tool == "tools/bench.py"
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"d2v_scale.benchmarks.{benchmark}").add_arguments(parser)
    parser.parse_args(rest)


def test_the_tests_that_it_names_are_those_that_need_a_gpu() -> None:
    marked = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if _needs_gpu(path)}
    assert set(re.findall(r"tests/[\w/]*test_\w+\.py", TEXT)) == marked


def _needs_gpu(path: Path) -> bool:
    return "@pytest.mark." + "gpu" in path.read_text()


def test_every_row_that_it_reads_exists_and_the_first_are_explained() -> None:
    names = {row.name for row in device_rows.ROWS}
    read = set(re.findall(r"`((?:ours|hf|varying|padded|compile|streams|host|recomputed)-\w+)`", TEXT))
    assert read <= names
    assert set(device_rows.first_rows()) - {"gradients", "ours-speech1", "ours-vision1"} <= read
