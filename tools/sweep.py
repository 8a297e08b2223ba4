"""A small grid over keys of a recipe: run every point, then compare them in a table and a plot.

  python tools/sweep.py tiny1_speech --grid objective.target.tap=ffn,block --seeds 1 2 3 --out out/tap \\
      -- --data speech/train.index.json --evaluation.train speech/train.index.json \\
         --evaluation.test speech/test.index.json --evaluation.every 100

Several --grid make all combinations; keys that belong together are one axis, joined by `+`:
`objective.masking.kind+objective.masking.inverse=random+false,block2d+true`. What follows `--` goes to train.py at
every point. Locally every run is one process, --jobs of them side by side; --slurm submits slurm/sweep.sh as an array
instead. Runs that are finished are not repeated, interrupted ones continue; --collect runs nothing. The table and the
plot are read from the runs' metrics.jsonl and written to OUT.
"""

import argparse
import hashlib
import itertools
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from run_quietly import run_quietly

from d2v_scale.command_line import parse
from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.plots.curves import series
from d2v_scale.status import read_status
from d2v_scale.tracking.record import read_records

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {
    "k-NN": ("knn_accuracy", 100, 1),
    "held-out share explained": ("held_out_explained", 1, 3),
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
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.settings) or "as in the recipe"

    def is_done(self) -> bool:
        status = read_status(self.run_dir)
        return status is not None and status.outcome == "done"


def axis_of(text: str) -> list[list[tuple[str, str]]]:
    """`a+b=1+x,2+y` to [[(a, 1), (b, x)], [(a, 2), (b, y)]]. Raises UserError."""
    keys, equals, values = text.partition("=")
    names = keys.split("+")
    points = [list(zip(names, value.split("+"), strict=False)) for value in values.split(",")]
    if not equals or any(len(value.split("+")) != len(names) or "" in value.split("+") for value in values.split(",")):
        raise UserError(f"--grid {text} is not KEY=VALUE,VALUE,...", "Keys joined by + need values joined by +.")
    return points


def points_of(options: argparse.Namespace) -> list[Point]:
    """All points; the recipe is parsed at each, so that a wrong key or value is said before anything runs."""
    points = []
    evaluated = False
    base, _ = parse([f"--recipe={options.recipe}", *options.training])
    for chosen in itertools.product(*(axis_of(text) for text in options.grid)):
        settings = tuple(itertools.chain.from_iterable(chosen))
        given = [f"--recipe={options.recipe}", *options.training, *(f"--{key}={value}" for key, value in settings)]
        recipe, _ = parse(given)
        recipe.check(world_size=1)
        evaluated |= recipe.evaluation.test is not None or recipe.evaluation.held_out is not None
        if options.equal_compute:
            given += equal_compute(base, recipe)
        name = "-".join(f"{key.rpartition('.')[2]}_{value}" for key, value in settings) or "recipe"
        for seed in options.seeds:
            # Runs of other settings in the same folder are other runs.
            digest = hashlib.sha256("\0".join(given).encode()).hexdigest()[:6]
            run_dir = (options.out / "runs" / f"{name}-s{seed}-{digest}").resolve()
            arguments = (*given, f"--seed={seed}", f"--run_dir={run_dir}")
            points.append(Point(settings, seed, arguments, run_dir))
    if not evaluated:
        remedy = "Add --evaluation.train, --evaluation.test and --evaluation.every after `--`."
        print(
            f"warning: no run is evaluated, and losses of different settings compare nothing. {remedy}", file=sys.stderr
        )
    return points


def equal_compute(base: Any, recipe: Any) -> list[str]:
    """Arguments that give `recipe` the FLOPs of `base`, its warm-up and annealing stretched alike."""
    from d2v_scale.planning.compute import step_flops, steps_for, stretched

    if len(base.data.sources) != 1:
        raise UserError("--equal_compute needs one source of data.", "Name shards with --data.")
    shards = base.data.sources[0].shards
    steps = steps_for(recipe, shards, base.optim.max_steps * step_flops(base, shards))
    return [f"--optim.max_steps={steps}", *stretched(recipe, steps)]


def run_local(points: list[Point], jobs: int) -> None:
    """Run what is not done, `jobs` at once. Raises UserError for the first that fails."""

    def run(point: Point) -> None:
        command = [sys.executable, str(ROOT / "d2v_scale" / "train.py"), *point.arguments]
        run_quietly(command, f"{point.label}, seed {point.seed},", env=os.environ | {"OMP_NUM_THREADS": "1"})
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
    listing = (options.out / "points.txt").resolve()
    listing.write_text("".join(shlex.join(point.arguments) + "\n" for point in waiting))
    array = f"--array=0-{len(waiting) - 1}%{options.jobs}"
    command = ["sbatch", array, f"--export=ALL,D2V_SCALE_SWEEP={listing}", str(ROOT / "slurm" / "sweep.sh")]
    print(shlex.join(command), flush=True)
    return 0 if options.dry_run else subprocess.run(command, check=False).returncode


def collect(points: list[Point], out: Path) -> str:
    """The table of what has been recorded so far; also writes it and the plot."""
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for point in points:
        records = read_records(point.run_dir) if (point.run_dir / "metrics.jsonl").is_file() else []
        groups.setdefault(point.label, []).extend([records] if records else [])
    lines = ["| | runs | steps | " + " | ".join(COLUMNS) + " |", "|---|" + "---|" * (len(COLUMNS) + 2)]
    for label, runs in groups.items():
        steps = "/".join(str(number) for number in sorted({max(int(r["step"]) for r in records) for records in runs}))
        cells = [_cell(runs, *column) for column in COLUMNS.values()]
        lines.append(f"| {label} | {len(runs)} | {steps} | " + " | ".join(cells) + " |")
    lines += ["", *early_signs([records for runs in groups.values() for records in runs])]
    text = "\n".join(lines) + "\n"
    (out / "sweep.md").write_text(text)
    plot(groups, out / "sweep.png")
    return text


def early_signs(runs: list[list[dict[str, Any]]]) -> list[str]:
    """How what was recorded half-way correlates with the last k-NN accuracy over all runs of the sweep."""
    lines = []
    for label, (name, _, _) in COLUMNS.items():
        pairs = []
        for records in runs:
            (steps, values), (_, accuracies) = series(records, name), series(records, "knn_accuracy")
            if len(steps) and len(accuracies):
                half = max(int(record["step"]) for record in records) / 2
                pairs.append((values[int(np.argmin(np.abs(np.asarray(steps) - half)))], accuracies[-1]))
        early, last = np.array(pairs).T if pairs else (np.zeros(0), np.zeros(0))
        if len(pairs) > 2 and np.std(early) > 0 and np.std(last) > 0:
            lines.append(f"- {label} half-way and k-NN in the end: r = {np.corrcoef(early, last)[0, 1]:+.2f}")
    return lines


def _cell(runs: list[list[dict[str, Any]]], name: str, factor: float, digits: int) -> str:
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
            steps, values = series(records, "knn_accuracy")
            axes.plot(steps, values, color=f"C{number % 10}", label=label if records is runs[0] else None)
    axes.set(xlabel="step", ylabel="k-NN accuracy of the teacher")
    if axes.has_data():
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main() -> int:
    """Run or submit, and compare."""
    own, training = sys.argv[1:], []
    if "--" in own:
        own, training = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name or YAML file")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V,V", help="an axis; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs, the table and the plot")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--equal_compute", action="store_true", help="same FLOPs at every point instead of same steps")
    parser.add_argument("--collect", action="store_true", help="only compare what was recorded")
    parser.add_argument("--slurm", action="store_true", help="submit an array of jobs; --collect later")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="with --slurm: only show the command")
    options = parser.parse_args(own)
    options.training = training
    try:
        points = points_of(options)
        options.out.mkdir(parents=True, exist_ok=True)
        if options.slurm:
            return submit(points, options)
        if not options.collect:
            run_local(points, max(1, options.jobs))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(collect(points, options.out))
    print(f"Written: {options.out / 'sweep.md'}, {options.out / 'sweep.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
