"""`d2v`: the list of verbs, their help, and what is imported before anything begins."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_scale.commands import verbs
from d2v_scale.commands.verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "deepspeed", "mlflow", "transformers")
# What each verb refuses without looking at data: arguments that contradict each other, or are no arguments of it.
REFUSED = {
    "shards": ["sounds", "a", "b"],
    "index": ["a.tar", "--modality", "smell"],
    "inspect": ["a.tar", "--steps", "many"],
    "tokenizer": ["a.tar"],
    "plan": ["--nodes", "0", "--recipe", "x"],
    "train": ["--ranks", "0", "--recipe", "x"],
    "submit": ["--recipe", "x", "--template", "nowhere/none.sh"],
    "sweep": ["demo_vision"],
    "report": ["nowhere"],
    "draw": ["nowhere", "--samples", "few"],
    "sync": ["nowhere"],
    "probe": ["nowhere", "--k", "0"],
    "align": ["nowhere", "--data", "nowhere", "--held_out", "2"],
    "extract": ["nowhere", "a.tar"],
    "export": ["nowhere", "out", "--to", "fairseq", "--license", "mit"],
    "import": ["nowhere"],
    "templates": [],
}
IN_ONE_PROCESS = """
import contextlib, io, json, sys
from d2v_scale.commands import verbs
said = {}
for name, arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = verbs.main([name, *arguments])
        except SystemExit as ended:
            code = ended.code
    heavy = [module for module in sys.argv[2:] if module in sys.modules]
    said[name] = [code, heavy, out.getvalue()]
print(json.dumps(said))
"""


def said_of(calls: dict[str, list[str]]) -> dict[str, tuple[int, list[str], str]]:
    """Exit code, heavy modules imported by then, and output of each verb's call, one after the other."""
    command = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps(list(calls.items())), *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def parsers(name: str) -> list[argparse.ArgumentParser]:
    """The parser of a verb, and those of its kinds."""
    parser = importlib.import_module(f"d2v_scale.commands.{VERBS[name].module}").make_parser()
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(one for action in inner for one in action.choices.values())]


def test_every_module_of_a_verb_has_its_row() -> None:
    folder = ROOT / "d2v_scale" / "commands"
    modules = {path.stem for path in folder.glob("*.py") if "def make_parser" in path.read_text()} - {"verbs"}
    assert {verb.module for verb in VERBS.values()} == modules
    assert set(REFUSED) == set(VERBS)


def test_help_and_refusals_import_nothing_that_is_slow() -> None:
    for calls, code in (({name: ["--help"] for name in VERBS}, 0), (REFUSED, 2)):
        said = said_of(calls)
        assert {name: answer[1] for name, answer in said.items() if answer[1]} == {}
        assert {name: answer for name, answer in said.items() if answer[0] != code} == {}
        if code == 2:
            assert all("error: " in text and "Traceback" not in text for _, _, text in said.values())


@pytest.mark.parametrize("name", VERBS)
def test_help_shows_every_default(name: str) -> None:
    for parser in parsers(name):
        shown = re.sub(r"\s+", " ", parser.format_help())
        for action in parser._actions:
            if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                continue
            assert action.help, (name, action.dest)
            is_value = action.default is not None and action.default is not False and action.default != []
            if is_value and action.default is not argparse.SUPPRESS:
                assert f"default: {action.default}" in shown, (name, action.dest)


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "{}", "--out", "p"],
        ["index", "{}", "--modality", "vision"],
        ["extract", "runs/vit", "{}", "features/"],
        ["probe", "runs/vit", "--data", "{}"],
        ["tokenizer", "{}", "tokenizer.model"],
    ],
)
def test_a_pattern_that_the_shell_has_resolved_is_to_be_quoted(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(tmp_path / f"train-{number:03}.tar") for number in range(1, 4)]
    given = [one for word in words for one in (files if word == "{}" else [word])]
    with pytest.raises(SystemExit) as ended:
        verbs.main(given)
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "words too many: " in said
    assert f"Quote the pattern, which your shell has resolved: '{tmp_path}/train-00*.tar'" in said


@pytest.mark.parametrize(
    ("words", "there"),
    [
        (["shards", "images", "src", "{}"], "file"),
        (["shards", "demo", "{}"], "file"),
        (["export", "runs/a", "{}", "--to", "hf"], "file"),
        (["export", "runs/a", "{}/below/it"], "file"),
        (["import", "x.pt", "{}"], "file"),
        (["extract", "runs/a", "a.tar", "{}"], "file"),
        (["index", "a.tar", "--modality", "vision", "--out", "{}"], "file"),
        (["inspect", "a.tar", "--out", "{}"], "file"),
        (["sweep", "demo_vision", "--grid", "seed=1,2", "--out", "{}"], "file"),
        (["probe", "runs/a", "--out", "{}"], "folder"),
        (["report", "runs/a", "--out", "{}"], "folder"),
        (["tokenizer", "a.tar", "{}"], "folder"),
    ],
)
def test_an_output_that_is_there_as_something_else_is_refused_before_anything_is_read(
    words: list[str], there: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file where a folder is to be made ended in a traceback, after the work."""
    place = tmp_path / "there"
    place.touch() if there == "file" else place.mkdir()
    with pytest.raises(SystemExit) as ended:
        verbs.main([word.format(place) for word in words])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{place} {'exists already, and is a file. Name' if there == 'file' else 'is a folder. Name a file'}" in said
    assert [*tmp_path.iterdir()] == [place]


def test_an_option_that_is_not_there_is_no_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    """Two indexes behind unknown options were answered with a pattern of both."""
    with pytest.raises(SystemExit):
        verbs.main(["probe", "runs/vit", "--train", "a.index.json", "--test", "b.index.json"])
    assert "unrecognized arguments: --train a.index.json" in capsys.readouterr().err.splitlines()[-1]


def test_the_list_of_verbs_is_a_line_each_and_fast(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        verbs.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.says)}$", said, re.MULTILINE)
    assert all(len(line) <= 100 for line in said.splitlines())
    code = "import sys; from d2v_scale.commands import verbs; verbs.make_parser(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert [name for name in loaded if name.startswith("d2v_scale.commands.")] == ["d2v_scale.commands.verbs"]
    assert not {*HEAVY, "numpy", "yaml"} & {*loaded}


def test_a_verb_that_is_none_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: 'trian' is no verb of d2v. Did you mean 'train'?\n"
    assert verbs.main([]) == 2
    assert "usage: d2v VERB" in capsys.readouterr().err


def test_the_doors_of_tools_lead_to_the_verbs(tmp_path: Path) -> None:
    """`python tools/export.py` works in a clone that is not installed."""
    files = (ROOT / "tools").glob("*.py")
    doors = {path.stem: path for path in files if "commands.verbs import run" in path.read_text()}
    without = {"train", "templates"}  # never were in tools/
    assert set(doors) == {verb.module for name, verb in VERBS.items() if name not in without}
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for module, arguments in (("probe", ["x", "--k", "0"]), ("sync_mlflow", ["nowhere"])):
        command = [sys.executable, str(doors[module]), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
    shown = subprocess.run([sys.executable, str(doors["index_shards"]), "--help"], capture_output=True, text=True)
    assert shown.stdout.startswith("usage: index_shards.py ")
    name = next(name for name, verb in VERBS.items() if verb.module == "index_shards")
    module = [sys.executable, "-m", "d2v_scale", name, "--help"]
    assert subprocess.run(module, capture_output=True, text=True).stdout.startswith("usage: d2v index ")


def test_a_door_runs_the_verb_of_its_module() -> None:
    for name, verb in VERBS.items():
        door = ROOT / "tools" / f"{verb.module}.py"
        if door.is_file():
            assert f'run("{name}", sys.argv[1:])' in door.read_text()
            assert f"d2v_scale.commands.{verb.module} import main" in door.read_text()
