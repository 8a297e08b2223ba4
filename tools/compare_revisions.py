"""Prove that a change keeps values: compare a revision with the work tree, by what their public programs do.

    python tools/compare_revisions.py                       # the parent commit with the work tree
    python tools/compare_revisions.py main --steps 8 --golden recorded/v1_audio
    git bisect run python /elsewhere/tools/compare_revisions.py GOOD --tree . --only losses --demos demo_vision

files: names of commands, templates, recipes and configurations. options: of every command's --help. recipes: every
packaged recipe as resolved. refusals: exit codes of wrong input. shards: the demo sets that each makes. losses: of the
demo recipes on the revision's sets, with every other number of their records, the last checkpoint and the names in the
run directory. checkpoints: a run of two processes, written by the revision and continued here from its middle, against
how the revision went on. tools: what exports, features and probes make of a checkpoint of the revision. golden: the
lines of check_golden.py.
Numbers are equal if all their bits are (golden: all printed digits). On the CPU; minutes.

The table says `equal`, `added: ...` (which is no difference), `DIFFERS: ...` or `not compared: ...`. Exit code 1:
something differs; 2: there is no such revision, or one of them does not start.
"""

import argparse
import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

import revision_rows as rows
from revision_rows import Row
from revision_side import TRAIN, Ended, Side, SideError

EXIT_BAD_INPUT = 2
PUBLIC = ("tools", "slurm", "ds_configs", "d2v_scale/recipes", TRAIN)
RECIPES = "d2v_scale/recipes"
MAKE_SHARDS = "tools/make_shards.py"
DEMO_DATA = "demo_data"
INVOCATION = {"run_dir", "resume", "stop_at", "init_from", "reset_teacher", "allow_recipe_change"}
"""What `--print_config` may show beside the recipe: options of one call, which no recipe.yaml holds."""
QUIET = ("--tracking.enabled", "false", "--tracking.plot_every", "null")

REFUSALS = (
    f"{TRAIN} --recipe no_such_recipe",
    f"{TRAIN} --no_such_key 1",
    f"{TRAIN} --optim.lr fast",
    f"{TRAIN} --model.vision.patch_size 5",
    f"{TRAIN} --model.backbone.heads 5",
    f"{TRAIN} --objective.target.top_k_layers 9",
    f"{TRAIN} --global_batch_size 0",
    f"{TRAIN} --deepspeed_config nowhere.json",
    f"{TRAIN} --resume nowhere",
    f"{TRAIN} --data nowhere/*.tar --run_dir runs/refused",
    "tools/check_golden.py nowhere",
    "tools/draw.py nowhere",
    "tools/export.py nowhere out/refused",
    "tools/extract.py nowhere nowhere/*.tar out/refused",
    "tools/import_weights.py nowhere out/refused",
    "tools/index_shards.py nowhere/*.tar --modality vision",
    "tools/inspect_shards.py nowhere/*.tar",
    "tools/make_shards.py images nowhere out/refused",
    "tools/plan.py --recipe no_such_recipe",
    "tools/probe.py nowhere",
    "tools/report.py nowhere --out out/refused.html",
    "tools/submit.py --recipe no_such_recipe --dry_run",
    "tools/summarize.py nowhere",
    "tools/sweep.py no_such_recipe --out out/refused --dry_run",
    "tools/sync_mlflow.py nowhere",
    "tools/train_tokenizer.py nowhere out/refused.model",
)
TOPOLOGIES = {
    "ZeRO-1": ("demo_vision", {"stage": 1}, ()),
    "ZeRO-3": ("demo_speech", {"stage": 3}, ()),
    "pipeline": ("demo_vision", {"stage": 1}, ("--parallel.pipeline", "2", "--accumulation", "2")),
    "tensor parallel": ("demo_text", {"stage": 1}, ("--parallel.tensor", "2")),
}
"""Two processes each: recipe, zero_optimization, further options."""


@dataclass(frozen=True)
class Pair:
    """The two trees, and how much is run of them."""

    old: Side
    new: Side
    steps: int
    golden: list[Path]
    chosen: list[str] | None = None
    """Demo recipes; None: all."""

    @property
    def sides(self) -> tuple[Side, Side]:
        """The revision and the work tree."""
        return self.old, self.new

    def both(self, script: str | Path, *arguments: object) -> tuple[Ended, Ended]:
        """The same call in both."""
        return self.old.run(script, *arguments), self.new.run(script, *arguments)

    def demos(self) -> dict[str, str]:
        """The revision's recipes that train on demo sets, each with its modality."""
        found = {}
        for path in sorted(self.old.path(RECIPES).glob("*.yaml")):
            modality = re.search(r"demo_data/(\w+)/", path.read_text())
            if modality is not None and (self.chosen is None or path.stem in self.chosen):
                found[path.stem] = modality.group(1)
        return found

    def give_shards(self, modality: str) -> str:
        """Both trees have the demo set that the revision makes: no two that espeak-ng speaks are alike. Returns what
        went wrong."""
        if (self.new.folder / DEMO_DATA / modality).exists():
            return ""
        made = self.old.run(MAKE_SHARDS, "demo", "--modality", modality, DEMO_DATA)
        if made.code:
            return f"not compared: the revision ends with {made.code}: {made.last_line}"
        shutil.copytree(*(side.folder / DEMO_DATA / modality for side in self.sides))
        return ""


def compare_files(pair: Pair) -> Iterator[Row]:
    """Names of what users call and give."""
    listed = []
    for side in pair.sides:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *PUBLIC]
        names = subprocess.run(command, cwd=side.root, capture_output=True, text=True, check=True).stdout.split("\n")
        listed.append({name for name in names if name and side.path(name).exists()})
    yield Row("files", ", ".join(PUBLIC), rows.compare_names(*listed))


def compare_options(pair: Pair) -> Iterator[Row]:
    """Options and subcommands of every command of the revision."""
    programs = sorted(path.name for path in pair.old.path("tools").glob("*.py") if "__main__" in path.read_text())
    for script in (TRAIN, *(f"tools/{name}" for name in programs)):
        if pair.new.path(script).exists():
            yield Row("options", script, rows.compare_names(*(set(_options(side, script)) for side in pair.sides)))


def _options(side: Side, script: str, *subcommand: str) -> Iterator[str]:
    text = side.run(script, *subcommand, "--help").output
    for line in re.findall(r"^\s+(-.*)$", text, re.MULTILINE):
        # A line of the list names an option before what it says about it.
        yield from (" ".join([*subcommand, name]) for name in re.findall(r"--[\w.-]+", re.split(r"\s{2,}", line)[0]))
    if subcommand:
        return
    choices = re.search(r"^positional arguments:\n\s+\{([\w,-]+)\}", text, re.MULTILINE)
    for name in choices.group(1).split(",") if choices else ():
        yield name
        yield from _options(side, script, name)


def compare_recipes(pair: Pair) -> Iterator[Row]:
    """Every recipe of the revision, resolved by both."""
    for path in sorted(pair.old.path(RECIPES).glob("*.yaml")):
        ended = pair.both(TRAIN, "--recipe", path.stem, "--print_config")
        result = _failure(ended)
        if not result:
            result = rows.compare(*(_resolved(side, one.output) for side, one in zip(pair.sides, ended, strict=True)))
        yield Row("recipes", path.stem, result)


def _resolved(side: Side, text: str) -> dict[str, object]:
    for place in (side.folder, side.root):
        text = text.replace(f"{place}/", "")
    # What libraries print while they are imported stands before the first key.
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if re.match(r"(name|run_dir):", line))
    return rows.flat(
        {key: value for key, value in yaml.safe_load("\n".join(lines[start:])).items() if key not in INVOCATION}
    )


def compare_refusals(pair: Pair) -> Iterator[Row]:
    """Exit codes of wrong input."""
    for line in REFUSALS:
        script, *arguments = line.split()
        if pair.old.path(script).exists():
            old, new = pair.both(script, *arguments)
            yield Row("refusals", line, rows.compare({"exit code": old.code}, {"exit code": new.code}))


def compare_shards(pair: Pair) -> Iterator[Row]:
    """The demo sets that each of them makes, byte by byte of their samples."""
    for modality in sorted(set(pair.demos().values())):
        call = (MAKE_SHARDS, "demo", "--modality", modality)
        result = _failure(pair.both(*call, "own_data"))
        if not result:
            old, new = (rows.contents(side.folder / "own_data" / modality) for side in pair.sides)
            result = rows.compare(old, new, show_values=False)
            if result != "equal" and not pair.old.run(*call, "own_data_again").code:
                again = rows.contents(pair.old.folder / "own_data_again" / modality)
                varying = {key for key, value in old.items() if again.get(key) != value}
                kept = ({key: one[key] for key in one if key not in varying} for one in (old, new))
                result = rows.compare(*kept, show_values=False)
                if varying:
                    result += f" but for {len(varying)} of {len(old)}, which the revision makes anew each time"
        yield Row("shards", modality, result)


def compare_losses(pair: Pair) -> Iterator[Row]:
    """The demo recipes in one process."""
    for recipe, modality in pair.demos().items():
        run_dir = f"runs/{recipe}"
        # One of them with all that a run directory holds.
        options = () if recipe == "demo_vision" else QUIET
        result = pair.give_shards(modality) or _failure(
            pair.both(
                TRAIN, "--recipe", recipe, "--run_dir", run_dir, "--stop_at", pair.steps, *_every_step(0), *options
            )
        )
        if result:
            yield Row("losses", recipe, result)
            continue
        folders = [side.folder / run_dir for side in pair.sides]
        yield Row("losses", recipe, rows.compare_series(*map(rows.metrics, folders)))
        yield Row("last checkpoint", recipe, _tensors(pair, *folders))
        names = ({path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in folders)
        yield Row("files of a run", recipe, rows.compare_names(*names))


def compare_checkpoints(pair: Pair) -> Iterator[Row]:
    """Runs of the revision, continued by both: by the revision without an interruption."""
    for name, (recipe, zero, options) in TOPOLOGIES.items():
        modality = pair.demos().get(recipe)
        if modality is None:
            continue
        run_dir = Path("runs", name.replace(" ", "_"))
        config = pair.old.folder / f"{run_dir.name}.json"
        config.write_text(json.dumps({"zero_optimization": zero}))
        end = ("--stop_at", 2 * pair.steps)
        start = ("--recipe", recipe, "--run_dir", run_dir, "--deepspeed_config", config, *options, *QUIET)
        failed = pair.give_shards(modality)
        if not failed:
            old = pair.old.run(TRAIN, *start, *_every_step(pair.steps), *end, ranks=2)
            failed = f"not compared: the revision ends with {old.code}: {old.last_line}" if old.code else ""
        if not failed:
            _copy_middle(pair.old.folder / run_dir, pair.new.folder / run_dir, pair.steps)
            new = pair.new.run(TRAIN, "--resume", run_dir, *end, ranks=2)
            failed = f"DIFFERS: cannot be continued, exit code {new.code}: {new.last_line}" if new.code else ""
        if failed:
            yield Row("checkpoints", name, failed)
            continue
        folders = [side.folder / run_dir for side in pair.sides]
        series = (rows.metrics(folder, after=pair.steps) for folder in folders)
        yield Row("checkpoints", f"{name}: losses", rows.compare_series(*series))
        yield Row("checkpoints", f"{name}: next checkpoint", _tensors(pair, *folders))


def _copy_middle(source: Path, target: Path, step: int) -> None:
    """The run as it was after `step`."""
    shutil.copytree(source, target)
    for checkpoint in sorted((target / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def compare_tools(pair: Pair) -> Iterator[Row]:
    """What both make of checkpoints of the revision."""
    for recipe, modality in pair.demos().items():
        run_dir = pair.old.folder / "runs" / recipe
        failed = pair.give_shards(modality)
        if not failed and not run_dir.exists():
            made = pair.old.run(TRAIN, "--recipe", recipe, "--run_dir", run_dir, "--stop_at", pair.steps, *QUIET)
            failed = f"not compared: the revision ends with {made.code}: {made.last_line}" if made.code else ""
        test = pair.old.folder / DEMO_DATA / modality / "test.index.json"
        calls: dict[str, tuple[object, ...]] = {
            "export --to hf": ("tools/export.py", run_dir, f"out/{recipe}-hf", "--to", "hf"),
            "export --to safetensors": ("tools/export.py", run_dir, f"out/{recipe}-plain", "--to", "safetensors"),
            "extract": ("tools/extract.py", run_dir, test, f"out/{recipe}-features", "--format", "shards"),
        }
        for call, (script, *arguments) in calls.items() if not failed else ():
            result = _failure(pair.both(str(script), *arguments))
            if not result:
                result = rows.compare(
                    *(
                        rows.contents(side.folder / str(arguments[-3 if call == "extract" else 1]))
                        for side in pair.sides
                    )
                )
            yield Row(call, recipe, result)
        if failed:
            yield Row("tools", recipe, failed)


def compare_golden(pair: Pair) -> Iterator[Row]:
    """Recorded runs of the reference: every printed line."""
    for fixture in pair.golden:
        old, new = pair.both("tools/check_golden.py", fixture)
        lines = [{line[:44].strip(): line[44:] for line in one.output.splitlines()} for one in (old, new)]
        yield Row("golden", fixture.name, rows.compare(*lines))


def _every_step(save_every: int) -> tuple[object, ...]:
    return ("--tracking.log_every", 1, "--checkpoint.every", save_every)


def _failure(ended: tuple[Ended, Ended]) -> str:
    """What is to be said instead of a comparison; nothing where both succeeded."""
    old, new = ended
    if old.code != new.code:
        return f"DIFFERS: exit code {old.code} -> {new.code}: {(new if new.code else old).last_line}"
    return f"not compared: both end with {old.code}: {old.last_line}" if old.code else ""


def _tensors(pair: Pair, *run_dirs: Path) -> str:
    """Tensors of the newest checkpoints, as the work tree reads them."""
    read = pair.new.run(Path(__file__).with_name("revision_tensors.py").resolve(), *run_dirs)
    if read.code:
        return f"DIFFERS: cannot be read: {read.last_line}"
    return rows.result_of(**json.loads(read.last_line))


SECTIONS: dict[str, Callable[[Pair], Iterator[Row]]] = {
    "files": compare_files,
    "options": compare_options,
    "recipes": compare_recipes,
    "refusals": compare_refusals,
    "shards": compare_shards,
    "losses": compare_losses,
    "checkpoints": compare_checkpoints,
    "tools": compare_tools,
    "golden": compare_golden,
}


@contextlib.contextmanager
def worktree(tree: Path, revision: str, folder: Path) -> Iterator[Path]:
    """`revision` checked out below `folder`; removed in the end, whatever happens."""
    target = folder / "tree"
    git = ["git", "-C", str(tree), "worktree"]
    added = subprocess.run([*git, "add", "--detach", str(target), revision], capture_output=True, text=True)
    try:
        if added.returncode:
            raise SideError(f"{revision!r} cannot be checked out: {added.stderr.strip()}")
        yield target
    finally:
        subprocess.run([*git, "remove", "--force", str(target)], capture_output=True)
        subprocess.run([*git, "prune"], capture_output=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the comparisons that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", nargs="?", default="HEAD^", help="default: the parent commit, HEAD^")
    parser.add_argument("--steps", type=int, default=4, help="of every run; twice as many for checkpoints (4)")
    parser.add_argument("--golden", type=Path, action="append", default=[], help="a recorded run; may be repeated")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), metavar="PART")
    parser.add_argument("--demos", nargs="+", metavar="RECIPE", help="only these of the demo recipes")
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="the work tree (this)")
    parser.add_argument("--keep", type=Path, help="new folder that the programs write into, and that is kept")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps: at least 1")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    found: list[Row] = []
    with contextlib.ExitStack() as stack:
        try:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-revisions-")))
            tree = stack.enter_context(worktree(options.tree.resolve(), options.revision, temporary))
            folder = (options.keep or temporary / "work").resolve()
            old = Side(options.revision, tree, folder / "old")
            stack.callback(old.close)
            new = Side("the work tree", options.tree.resolve(), folder / "new")
            stack.callback(new.close)
            pair = Pair(old, new, options.steps, [path.resolve() for path in options.golden], options.demos)
            for name in options.only:
                for row in SECTIONS[name](pair):
                    print(f"{row.kind}: {row.name}: {row.result}", file=sys.stderr, flush=True)
                    found.append(row)
        except SideError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_BAD_INPUT
    print("\n".join(rows.table(found)))
    return 1 if any(row.differs for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
