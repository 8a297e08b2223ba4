"""Does it learn? Small models on real sets: data2vec against random weights, labels alone, and raw features.

  bash tools/evidence.sh [--data DIR] [--quick]
  bash tools/evidence.sh --pairs [ARM ...] [--data DIR]     pretrained against its random start, on arrays
  bash tools/evidence.sh --compute 1,4,16 [--data DIR]      old and new recipes over compute; see evidence_compute.py

DIR holds sets (or archives of them, *.tar.gz) laid out as
  vision   NAME/{train,test}/CLASS/*.jpg
  speech   NAME/recordings/LABEL_SPEAKER_TAKE.wav     test: takes 0-4 of every label and speaker
  text     NAME.csv with class, title, text, no header; test: every fifth row
Every row is k-NN and a linear probe on frozen features (mean over positions, last four blocks) of the same labelled
split, over seeds. Pretraining runs of 1.0 and 2.0 get the same FLOPs, and so do the supervised ones. What is finished
is not repeated while data, recipes and code stay the same: start again after an interruption. Writes evidence.md and
evidence.json to --out. At most 5,000 and 2,000 samples of the two parts are evaluated, and of each what the recipes
read: 32x32 pixels, a second of sound, 63 tokens. Recordings of a second take 2.4 times as long as spoken digits.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from evidence_compute import computes_of, run_computes
from evidence_compute_sets import SETS as COMPUTE_SETS
from evidence_curves import draw
from evidence_jobs import ROOT, run_all, train_run
from evidence_pairs import ARMS, ROWS, SEEDS, run_pairs
from evidence_sets import LAYOUTS, RealSet, default_folder, prepare
from evidence_table import SEEDS_OF_COMPUTE, early_warning, table

from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.model.stem_config import Kind
from d2v_scale.process.started import MEASURE
from d2v_scale.shards.content import length_of
from d2v_scale.shards.shard_index import Members, SetIndex
from d2v_scale.tracking.environment import git_revision

VERSIONS = ("1.0", "2.0")
LEARNED = ("supervised", *VERSIONS)
MAX_TRAIN, MAX_TEST = 5000, 2000
QUICK = {"seeds": 1, "share": 0.5}
EVALUATIONS = 4
"""k-NN this often during pretraining."""


@cache
def code_digest() -> str:
    """Of the package and of this program: results of other code are not taken for this one's."""
    files = [*sorted((ROOT / "d2v_scale").rglob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """One cell of the table: a row at one seed."""

    modality: Kind
    row: str
    """raw, random 1.0, random 2.0, supervised, 1.0 or 2.0."""
    seed: int
    real: RealSet
    steps: int
    stretched: tuple[str, ...]
    """Arguments that stretch what the recipe counts in steps to this many."""
    out: Path

    @property
    def version(self) -> str:
        """The recipe's; what is not of one version takes 1.0's encoder."""
        return "2.0" if self.row.endswith("2.0") else "1.0"

    @property
    def recipe_name(self) -> str:
        return f"tiny{self.version[0]}_{self.modality}"

    @property
    def name(self) -> str:
        return f"{self.modality}-{self.row.replace(' ', '-')}-s{self.seed}"

    @property
    def digest(self) -> str:
        """Of all that the result depends on."""
        recipe = (ROOT / "d2v_scale" / "recipes" / f"{self.recipe_name}.yaml").read_bytes()
        data = b"".join(Path(index).read_bytes() for index in (self.real.train, self.real.test))
        about = repr((self.row, self.seed, self.steps, code_digest()))
        return hashlib.sha256(recipe + data + about.encode()).hexdigest()[:16]

    @property
    def result(self) -> Path:
        return self.out / "results" / f"{self.name}.json"

    def is_done(self) -> bool:
        return self.result.is_file() and json.loads(self.result.read_text())["digest"] == self.digest

    def arguments(self) -> list[str]:
        """Of train.py."""
        every = max(1, self.steps // EVALUATIONS)
        return [
            *(f"--recipe={self.recipe_name}", f"--seed={self.seed}", f"--data={self.real.train}", "--data.workers=0"),
            *(f"--optim.max_steps={self.steps}", f"--checkpoint.every={self.steps}", "--tracking.enabled=false"),
            *(f"--evaluation.train={self.real.train}", f"--evaluation.test={self.real.test}"),
            *self.stretched,
            *(f"--evaluation.every={every}", f"--evaluation.max_train={MAX_TRAIN // 2}"),
        ]


def run(job: Job) -> dict[str, Any]:
    """Do one job and write its result. Runs in a process of its own."""
    import torch

    from d2v_scale.command_line import parse
    from d2v_scale.data.labelled import LabelledSet
    from d2v_scale.evaluation import supervised
    from d2v_scale.evaluation.features import extract
    from d2v_scale.evaluation.frozen import FrozenEncoder
    from d2v_scale.evaluation.probes import score
    from d2v_scale.evaluation.raw import raw_features
    from d2v_scale.parallel.groups import single_process

    torch.set_num_threads(1)
    began = time.monotonic()
    recipe, _ = parse(job.arguments())
    single_process()

    def labelled(shards: str, limit: int) -> LabelledSet:
        return LabelledSet(shards, job.modality, recipe.data, recipe.model, limit=limit)

    train, test = labelled(job.real.train, MAX_TRAIN), labelled(job.real.test, MAX_TEST)
    figures: dict[str, Any] = {}
    encoder: FrozenEncoder | None = None
    if job.row == "raw":
        pair = raw_features(train, recipe.model), raw_features(test, recipe.model)
        figures |= score(*pair[0], *pair[1], best_of_plain_and_whitened=True)
        figures["largest_class"] = float(pair[1][1].bincount().max() / len(pair[1][1]))
    elif job.row == "supervised":
        model = supervised.train_from_scratch(recipe, train, job.steps)
        figures["accuracy"] = supervised.accuracy(model, test)
    elif job.row in VERSIONS:
        directory = job.out / "runs" / f"{job.name}-{job.digest}"
        figures |= pretrain(job, directory)
        encoder = FrozenEncoder.load(directory)
    else:
        encoder = FrozenEncoder.untrained(recipe)
    if encoder is not None:
        a, b = (extract(encoder.hidden_states, part, encoder.valid_positions, encoder.device) for part in (train, test))
        figures |= score(a.last(4), a.labels_n, b.last(4), b.labels_n)
    result = {"modality": job.modality, "row": job.row, "seed": job.seed, "digest": job.digest, "steps": job.steps}
    result |= {"minutes": (time.monotonic() - began) / 60, **figures}
    job.result.parent.mkdir(parents=True, exist_ok=True)
    job.result.write_text(json.dumps(result, indent=1) + "\n")
    return result


def pretrain(job: Job, directory: Path) -> dict[str, Any]:
    """Run train.py to its end (an interrupted run continues); what its record says."""
    records = train_run(job.arguments(), directory, job.name)
    last = [record for record in records if "target_rank" in record][-1]
    curve = [
        {key: record[key] for key in ("step", *WATCHED) if key in record} for record in records if WATCHED[0] in record
    ]
    return {"curve": curve, "target_std": last["target_std"], "target_rank": last["target_rank"], "loss": last["loss"]}


WATCHED = ("knn_accuracy", "held_out_loss", "held_out_explained")


def plan(sets: dict[Kind, RealSet], seeds: int, share: float, out: Path) -> tuple[list[Job], dict[Kind, float]]:
    """All jobs, seed by seed and the longest first, and each modality's FLOPs of one run."""
    from d2v_scale.command_line import parse
    from d2v_scale.evaluation.supervised import BATCH_SIZE
    from d2v_scale.planning.compute import mean_sample, step_flops, steps_for, stretched

    jobs, budgets = [], {}
    for modality, real in sets.items():
        recipes = {v: parse([f"--recipe=tiny{v[0]}_{modality}", f"--data={real.train}"])[0] for v in VERSIONS}
        first = recipes["1.0"]
        budgets[modality] = share * first.optim.max_steps * step_flops(first)
        steps = {version: steps_for(recipe, budgets[modality]) for version, recipe in recipes.items()}
        # A supervised step is the student's forward and backward over unmasked samples: three forwards.
        forward, _ = mean_sample(first, first.data.sources[0])
        step = BATCH_SIZE * 3 * (forward.teacher + forward.student_stem / 3)
        steps["supervised"] = max(1, round(budgets[modality] / step))
        for row in ("2.0", "1.0", "supervised", "random 1.0", "random 2.0", "raw"):
            for seed in range(1, 2 if row == "raw" else seeds + 1):
                taken = steps.get(row, 1)
                arguments = stretched(recipes["2.0" if row.endswith("2.0") else "1.0"], taken)
                jobs.append(Job(modality, row, seed, real, taken, arguments, out))
    return sorted(jobs, key=lambda job: (job.seed, job.row not in LEARNED)), budgets


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the sets; default: data here or in a folder beside")
    parser.add_argument(
        "--pairs", nargs="*", metavar="ARM", help=f"the table of pairs instead, of all arms or some: {', '.join(ARMS)}"
    )
    parser.add_argument(
        "--compute",
        metavar="C,C",
        help="rows at these multiples of the recipes' FLOPs instead, each a file",
    )
    parser.add_argument("--probes", action="store_true", help="of --compute: without fine-tuning")
    parser.add_argument(
        "--sets", nargs="+", choices=list(COMPUTE_SETS), help=f"of --compute; default: {' '.join(COMPUTE_SETS)}"
    )
    parser.add_argument(
        "--rows", type=Path, default=ROWS, help="folder of rows of --pairs and --compute; default: docs/evidence"
    )
    parser.add_argument("--out", type=Path, help="default: out/evidence, with --quick out/evidence-quick")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK['share']} of the steps, one seed")
    parser.add_argument("--modalities", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--seeds", type=int, help=f"default: 3, of --pairs {SEEDS}")
    parser.add_argument("--share", type=float, help="of the recipes' steps; default: 1")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes side by side")
    return parser


def main() -> int:
    """Prepare, run, print."""
    arguments = make_parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault(MEASURE, "0")  # what is compared is computed alike
    try:
        if arguments.compute is not None:
            return evidence_of_computes(arguments)
        return evidence_of_pairs(arguments) if arguments.pairs is not None else evidence_of_kinds(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def evidence_of_pairs(arguments: argparse.Namespace) -> int:
    """Pretrained encoders against their random starts, seed by seed."""
    seeds = SEEDS if arguments.seeds is None else arguments.seeds
    if arguments.quick or arguments.share is not None:
        raise UserError("--quick and --share say nothing to --pairs.", "Give fewer --seeds.")
    if seeds < 1 or arguments.jobs < 1:
        raise UserError("--seeds and --jobs must be positive.")
    out = (arguments.out or ROOT / "out" / "evidence").resolve()

    def data() -> Path:
        return (arguments.data or default_folder(ROOT)).resolve()

    print("\n" + run_pairs(arguments.pairs, seeds, data, arguments.rows.resolve(), out, arguments.jobs))
    return 0


def evidence_of_computes(arguments: argparse.Namespace) -> int:
    """Old and new recipes over compute, a row an arm and seed."""
    if arguments.quick or arguments.share is not None or arguments.pairs is not None:
        raise UserError("--quick, --share and --pairs say nothing to --compute.", "Leave them out.")
    computes = computes_of(arguments.compute)
    seeds = SEEDS_OF_COMPUTE if arguments.seeds is None else arguments.seeds
    if seeds < 1 or arguments.jobs < 1:
        raise UserError("--seeds and --jobs must be positive.")
    out = (arguments.out or ROOT / "out" / "evidence-compute").resolve()
    data = (arguments.data or default_folder(ROOT)).resolve()
    rows = arguments.rows.resolve()
    names, probes = arguments.sets or list(COMPUTE_SETS), arguments.probes
    print("\n" + run_computes(computes, names, seeds, data, rows, out, arguments.jobs, learns_labels=not probes))
    for path in draw(rows, ROOT / ".assets" if rows == ROWS else out):
        print(f"Written: {path}")
    return 0


def evidence_of_kinds(arguments: argparse.Namespace) -> int:
    """1.0, 2.0, labels alone, random weights and raw features, at equal FLOPs."""
    quick = arguments.quick
    seeds = arguments.seeds if arguments.seeds is not None else int(QUICK["seeds"]) if quick else 3
    share = arguments.share if arguments.share is not None else QUICK["share"] if quick else 1.0
    out = (arguments.out or ROOT / "out" / ("evidence-quick" if quick else "evidence")).resolve()
    began = time.monotonic()
    if seeds < 1 or share <= 0 or arguments.jobs < 1:
        raise UserError("--seeds, --share and --jobs must be positive.")
    sets = prepare((arguments.data or default_folder(ROOT)).resolve(), out, arguments.modalities)
    jobs, budgets = plan(sets, seeds, share, out)
    results = run_all(jobs, run, arguments.jobs)
    report(results, sets, budgets, out, (time.monotonic() - began) / 60)
    return 0


def describe(real: RealSet) -> str:
    """How many samples are evaluated, and how many of them are longer than what the recipes read."""
    from d2v_scale import modalities
    from d2v_scale.command_line import parse

    train, test = SetIndex.load(Path(real.train)), SetIndex.load(Path(real.test))
    used = (min(train.samples, MAX_TRAIN), min(test.samples, MAX_TEST))
    told = f"{used[0]:,} of {train.samples:,} training and {used[1]:,} of {test.samples:,} test samples"
    told += f" of {len(train.classes)} classes"
    recipe, _ = parse([f"--recipe=tiny1_{real.modality}", f"--data={real.train}"])
    stem = modalities.of(recipe.model, real.modality)
    longest, shown = stem.longest_read(recipe.data), length_of(stem.content).shown
    if longest is None or shown is None:
        return told
    _, unit, per_unit = shown
    members = [Members.load(Path(real.test).parent / shard.members) for shard in test.shards]
    longer = sum(int((found.length_n > longest).sum()) for found in members) / max(1, test.samples)
    read = f"{longest / per_unit:g} {unit}"
    return f"{told}; {longer:.0%} of the test samples are longer than {read}, which is what is read of them"


def report(
    results: list[dict[str, Any]], sets: dict[Kind, RealSet], budgets: dict[str, float], out: Path, minutes: float
) -> None:
    """Print the table; write it and everything behind it."""
    samples = {modality: describe(real) for modality, real in sets.items()}
    text = table(results, {modality: real.name for modality, real in sets.items()}, budgets, samples)
    text += "\n" + early_warning(results)
    print("\n" + text)
    (out / "evidence.md").write_text(text)
    about = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": git_revision(),
        "minutes": minutes,
        "flops_per_run": budgets,
        "sets": {modality: dataclasses.asdict(real) for modality, real in sets.items()},
        "results": results,
    }
    (out / "evidence.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"Written: {out / 'evidence.md'}, {out / 'evidence.json'}")


if __name__ == "__main__":
    sys.exit(main())
