"""What the tests of README and CONTRIBUTING read of them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of the bash blocks, without comments, continued lines joined."""
    found = []
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            command = " ".join(line.split("#")[0].split())
            if command:
                found.append(command)
    return found


def missing_files(command: str) -> list[str]:
    """Words of a command that look like files of the repository and are not there."""
    ours = ("tools/", "tests/", "slurm/", "ds_configs/", "d2v_scale/")
    return [word for word in shlex.split(command) if word.startswith(ours) and not (ROOT / word).exists()]


def edited(source: str, hunks: str) -> str:
    """`source` after the hunks of a diff without line numbers, parted by `@@`. What a hunk takes for granted or away
    must be there once; `…` in it stands for the rest of a line, and in what it puts there for the same, in order.
    Raises AssertionError."""
    for hunk in hunks.split("\n@@\n"):
        lines = hunk.strip("\n").splitlines()
        before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        pattern = "\n" + "(.*)".join(map(re.escape, before.split("…")))
        places = list(re.finditer(f"(?={pattern})", f"\n{source}"))
        assert len(places) == 1, f"{len(places)} times, not once:\n{before}"
        kept, parts = places[0].groups(), after.split("…")
        filled = parts[0] + "".join(text + part for text, part in zip(kept, parts[1:], strict=True))
        source = re.sub(pattern, lambda _: f"\n{filled}", f"\n{source}", count=1).removeprefix("\n")  # noqa: B023
    return source


def apply(diff: str, root: Path) -> None:
    """Edit the files below `root` that a diff names, or write those that are not there."""
    parts = re.split(r"^--- (\S+)\n", diff, flags=re.MULTILINE)
    assert not parts[0].strip(), "a diff begins with `--- FILE`"
    for name, hunks in zip(parts[1::2], parts[2::2], strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(edited(path.read_text(), hunks) if path.exists() else edited("", hunks) + "\n")
