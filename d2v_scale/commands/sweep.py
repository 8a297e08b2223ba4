"""A small grid over keys of a recipe: run every point, then compare them in a table and a plot.

  d2v sweep tiny1_speech --grid objective.target.tap=ffn,block --seeds 1 2 3 --out out/tap \\
      -- --data speech/train.index.json --evaluation.train speech/train.index.json \\
         --evaluation.test speech/test.index.json --evaluation.every 100

Several --grid make all combinations; keys that belong together are one axis, joined by `+`:
`objective.masking.kind+objective.masking.inverse=random+false,block2d+true`. Commas inside of brackets and quotes
belong to a value: `--grid 'optim.betas=[0.9,0.98],[0.9,0.95]'`, `--grid 'name="a, b",c'`. `--grid seed=1,2` is a row of
the table for each seed, --seeds is one row for all. What follows `--` goes to train.py at
every point. Locally every run is one process, --jobs of them side by side; --slurm submits slurm/sweep.sh as an array
instead. Runs that are finished are not repeated, interrupted ones continue; --collect runs nothing. The table and the
plot are read from the runs' metrics.jsonl and written to OUT.
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d2v_scale import templates
from d2v_scale.answers.help_text import VerbParser
from d2v_scale.answers.outputs import out_folder
from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.plots.curves import series
from d2v_scale.plots.signs import knn, signs
from d2v_scale.process.started import MEASURE
from d2v_scale.process.status import read_status
from d2v_scale.programs.own_program import TRAINING
from d2v_scale.programs.run_quietly import run_quietly
from d2v_scale.redaction import redact
from d2v_scale.tracking.names import by_stem
from d2v_scale.tracking.record import read_records

COLUMNS = {
    "k-NN": ("knn_accuracy", 100, 1),
    "held-out loss": ("held_out_loss", 1, 3),
    "held-out share explained": ("held_out_explained", 1, 3),
    "RankMe": ("rankme", 1, 1),
    "LiDAR": ("lidar", 1, 1),
    "target std": ("target_std", 1, 2),
    "target rank": ("target_rank", 1, 1),
    "loss": ("loss", 1, 3),
}
"""Heading: recorded name, factor, digits. Last value of a run, mean and standard deviation over seeds."""


@dataclass(frozen=True)
class Point:
    """One point of the grid at one seed."""

    settings: tuple[tuple[str, str], ...]
    """Keys and values that differ between points."""
    seed: int
    arguments: tuple[str, ...]
    """Of train.py, --run_dir included."""
    run_dir: Path

    @property
    def label(self) -> str:
        """What tells it from others, seeds aside."""
        last = [key.rpartition(".")[2] for key, _ in self.settings]
        keys = last if len({*last}) == len(last) else [key for key, _ in self.settings]
        # What could end a value inside of another is quoted.
        values = [json.dumps(v) if re.search(r"[\s\"]|^$", v) else v for _, v in self.settings]
        return ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True)) or "as in the recipe"

    def is_done(self) -> bool:
        status = read_status(self.run_dir)
        return status is not None and status.outcome == "done"


def axis_of(text: str) -> list[list[tuple[str, str]]]:
    """`a+b=1+x,2+y` to [[(a, 1), (b, x)], [(a, 2), (b, y)]]. Raises UserError."""
    keys, _, values = text.partition("=")
    names = [name.strip() for name in keys.split("+")]
    points = []
    for point in _split(values, ","):
        parts = _split(point, "+") if len(names) > 1 else [point.strip()]
        if len(parts) != len(names) or "" in parts or "" in names:
            raise UserError(f"--grid {text} is not KEY=VALUE,VALUE,...", "Keys joined by + need values joined by +.")
        points.append([(name, _unquoted(part)) for name, part in zip(names, parts, strict=True)])
    return points


def _split(text: str, separator: str) -> list[str]:
    """`text` at separators outside of brackets and quotes. Raises UserError where these do not end."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        before = parts[-1].rstrip()
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (not before or before[-1] in "[{(,:+"):  # that of `it's` is none
            quote = character
        elif character == separator and depth == 0:
            parts.append("")
            continue
        else:
            depth += (character in "[{(") - (character in "]})")
        parts[-1] += character
        if depth < 0:
            break
    if depth or quote:
        raise UserError(f"--grid: {text} has a bracket or a quote without its other half", "Put the value in quotes.")
    return [part.strip() for part in parts]


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] in "'\"" and value.find(value[0], 1) == len(value) - 1 else value


def points_of(options: argparse.Namespace) -> list[Point]:
    """All points, each once; the recipe is parsed at each: a wrong key or value is said before anything runs."""
    from d2v_scale.command_line import parse
    from d2v_scale.interop.teacher_model import adopt_teacher
    from d2v_scale.recipe import to_dict

    points: list[Point] = []
    seen: dict[str, Point] = {}
    evaluated = False
    axes = [axis_of(text) for text in options.grid]
    base, _ = parse([f"--recipe={options.recipe}", *options.training])
    seeds = seeds_of(options, axes, base.seed)
    for chosen in itertools.product(*axes):
        settings = tuple(itertools.chain.from_iterable(chosen))
        given = [f"--recipe={options.recipe}", *options.training, *(f"--{key}={value}" for key, value in settings)]
        recipe, how = parse(given)
        adopt_teacher(recipe, how)
        recipe.check(world_size=1)
        evaluated |= bool(recipe.evaluation.shards)
        if options.equal_compute:
            given += equal_compute(base, recipe)
        for seed in [recipe.seed] if seeds is None else seeds:
            own_seed = [] if seeds is None else [f"--seed={seed}"]
            run_dir = (options.out / "runs" / _folder(settings, seed, given)).resolve()
            point = Point(settings, seed, (*given, *own_seed, f"--run_dir={run_dir}"), run_dir)
            computed = json.dumps([to_dict(recipe) | {"seed": seed}, asdict(how)], sort_keys=True, default=str)
            if computed in seen:
                first = seen[computed]
                print(f"warning: {point.label} is {first.label}, seed {seed}: it runs once.", file=sys.stderr)
                continue
            seen[computed] = point
            points.append(point)
    if not evaluated:
        remedy = "Add --evaluation.train, --evaluation.test and --evaluation.every after `--`."
        print(
            f"warning: no run is evaluated, and losses of different settings compare nothing. {remedy}", file=sys.stderr
        )
    return points


def seeds_of(options: argparse.Namespace, axes: list[list[list[tuple[str, str]]]], base: int) -> list[int] | None:
    """The seeds of every point; None where an axis gives them. Raises UserError for a key that is given twice."""
    keys = [key for axis in axes for key, _ in axis[0]]
    given = {word.removeprefix("--").partition("=")[0] for word in options.training if word.startswith("--")}
    for key in ("run_dir", "resume"):
        if key in given or key in keys:
            raise UserError(f"--{key} is given, but every point has a directory of its own", "Leave it out.")
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--grid gives {key} on two axes", "Give each key once.")
    places = {"--grid seed=": "seed" in keys, "--seeds": options.seeds is not None, "--seed": "seed" in given}
    several = [place for place, there in places.items() if there]
    if len(several) > 1:
        raise UserError(f"{' and '.join(several)} both give seeds", "Leave one of them out.")
    if "seed" in keys:
        return None
    return options.seeds or [base if "seed" in given else 1]


def _folder(settings: tuple[tuple[str, str], ...], seed: int, given: list[str]) -> str:
    """A name that says the settings, as far as a file name can."""
    said = "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in settings) or "recipe"
    # Runs of other settings in the same folder, and values that look alike in a file name, are other runs.
    digest = hashlib.sha256("\0".join(given).encode()).hexdigest()[:6]
    name = re.sub(r"[^-+.=\w]", "_", said, flags=re.ASCII)[:120]
    return f"{name}-s{seed}-{digest}"


def equal_compute(base: Any, recipe: Any) -> list[str]:
    """Arguments that give `recipe` the FLOPs of `base`, its warm-up and annealing stretched alike. Each is counted on
    its own sources."""
    from d2v_scale.planning.compute import step_flops, steps_for, stretched

    steps = steps_for(recipe, base.optim.max_steps * step_flops(base))
    return [f"--optim.max_steps={steps}", *stretched(recipe, steps)]


def run_local(points: list[Point], jobs: int) -> None:
    """Run what is not done, `jobs` at once. Raises UserError for the first that fails."""
    # What is compared is computed alike: no run measures for itself whether bf16 is faster here.
    environment = {MEASURE: "0", **os.environ, "OMP_NUM_THREADS": "1"}

    def run(point: Point) -> None:
        command = [sys.executable, str(TRAINING), *point.arguments]
        run_quietly(command, f"{point.label}, seed {point.seed},", env=environment)
        print(f"done: {point.label}, seed {point.seed}", flush=True)

    waiting = [point for point in points if not point.is_done()]
    print(f"{len(points)} runs, {len(points) - len(waiting)} of them finished before", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for future in [pool.submit(run, point) for point in waiting]:
            try:
                future.result()
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise


def submit(points: list[Point], options: argparse.Namespace) -> int:
    """Submit one array job for what is not done; returns sbatch's exit code."""
    waiting = [point for point in points if not point.is_done()]
    if not waiting:
        print("All runs are finished; --collect compares them.")
        return 0
    listing = own_list(options.out, waiting)
    array = f"--array=0-{len(waiting) - 1}%{max(1, options.jobs)}"
    command = ["sbatch", array, f"--export=ALL,D2V_SCALE_SWEEP={listing}", str(templates.folder("slurm") / "sweep.sh")]
    print(shlex.join(command), flush=True)
    return 0 if options.dry_run else subprocess.run(command, check=False).returncode


def own_list(out: Path, points: list[Point]) -> Path:
    """The file that the tasks of one submission read their points from, when they start and when they are requeued: a
    file that is there is never written again. Says which points earlier submissions have in their lists."""
    if "," in str(out.resolve()):
        raise UserError(f"sbatch takes no path with a comma ({out.resolve()})", "Choose another --out.")
    lines = [shlex.join(point.arguments) for point in points]
    if secret := next((line for line in lines if redact(line) != line), None):
        raise UserError(
            f"The list of points would hold a secret: {secret}",
            "Write it as $NAME, an environment variable, which is looked up when it is needed.",
        )
    if any(len(line.splitlines()) != 1 for line in lines):
        raise UserError("A value has several lines, and the list of points has one for each", "Write it in one line.")
    text = "".join(f"{line}\n" for line in lines)
    for number in itertools.count(1):
        path = (out / ("points.txt" if number == 1 else f"points-{number}.txt")).resolve()
        try:
            with path.open("x") as file:
                file.write(text)
            return path
        except FileExistsError:
            earlier = path.read_text()
        if earlier == text:
            return path
        again = len({*lines} & {*earlier.splitlines()})
        if again:
            print(
                f"warning: {again} of these points are in {path}, too, and not finished. If that array is still queued "
                "or running, cancel it or wait for it: of two tasks with one run directory the later one ends.",
                file=sys.stderr,
            )
    raise AssertionError


def collect(points: list[Point], out: Path) -> str:
    """The table of what has been recorded so far; also writes it and the plot."""
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for point in points:
        records = read_records(point.run_dir) if (point.run_dir / "metrics.jsonl").is_file() else []
        groups.setdefault(point.label, []).extend([records] if records else [])
    columns = _columns([records for runs in groups.values() for records in runs])
    lines = ["| | runs | steps | " + " | ".join(columns) + " |", "|---|" + "---|" * (len(columns) + 2)]
    for label, runs in groups.items():
        steps = "/".join(str(number) for number in sorted({max(int(r["step"]) for r in records) for records in runs}))
        cells = [_cell(runs, *column) for column in columns.values()]
        lines.append(f"| {label.replace('|', chr(92) + '|')} | {len(runs)} | {steps} | " + " | ".join(cells) + " |")
    lines += ["", *signs(groups, {label: name for label, (name, _, _) in columns.items()})]
    text = "\n".join(lines) + "\n"
    (out / "sweep.md").write_text(text)
    plot(groups, out / "sweep.png")
    return text


def _columns(runs: list[list[dict[str, Any]]]) -> dict[str, tuple[str, float, int]]:
    """`COLUMNS` as they were recorded: of each figure one of all, or one of every stem."""
    names = list(dict.fromkeys(name for records in runs for record in records for name in record))
    columns: dict[str, tuple[str, float, int]] = {}
    for heading, (figure, factor, digits) in COLUMNS.items():
        for stem, name in (by_stem(names, figure) or {"": figure}).items():
            columns[f"{heading}, {stem}" if stem else heading] = name, factor, digits
    return columns


def _cell(runs: list[list[dict[str, Any]]], name: str, factor: float, digits: int) -> str:
    import numpy as np

    values = [factor * found[-1] for records in runs if (found := series(records, name)[1])]
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def plot(groups: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """k-NN accuracy over steps, a colour for each point and a line for each seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, (label, runs) in enumerate(groups.items()):
        for records in runs:
            steps, values = knn(records)
            name = label.replace("$", r"\$") if records is runs[0] else None  # formulas begin with one
            axes.plot(steps, values, color=f"C{number % 10}", label=name)
    axes.set(xlabel="step", ylabel="k-NN accuracy of the teacher")
    if axes.has_data():
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def make_parser() -> argparse.ArgumentParser:
    """The command line, up to `--`."""
    parser = VerbParser(description=__doc__)
    parser.add_argument("recipe", help="name or YAML file")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V,V", help="an axis; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of every point; default: 1")
    parser.add_argument("--out", type=out_folder, required=True, help="folder of the runs, the table and the plot")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--equal_compute", action="store_true", help="same FLOPs at every point instead of same steps")
    parser.add_argument("--collect", action="store_true", help="only compare what was recorded")
    parser.add_argument("--slurm", action="store_true", help="submit an array of jobs; --collect later")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="show what would run or be submitted")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run or submit, and compare."""
    own, training = sys.argv[1:] if arguments is None else arguments, list[str]()
    if "--" in own:
        own, training = own[: own.index("--")], own[own.index("--") + 1 :]
    options = make_parser().parse_args(own)
    options.training = training
    try:
        points = points_of(options)
        options.out.mkdir(parents=True, exist_ok=True)
        if options.slurm:
            return submit(points, options)
        if options.dry_run:
            print("\n".join(shlex.join(["train.py", *map(redact, point.arguments)]) for point in points))
            return 0
        if not options.collect:
            run_local(points, max(1, options.jobs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(collect(points, options.out))
    print(f"Written: {options.out / 'sweep.md'}, {options.out / 'sweep.png'}")
    return 0
