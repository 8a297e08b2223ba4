"""Joint training against separate encoders at equal FLOPs: what each modality is worth, and whether they come together.

  python tools/evidence_joint.py [--sets concepts digits] [--arms ARM ...] [--seeds N] [--data DIR]
  python tools/evidence_joint.py --quick        a few steps of every arm, to see that it runs; rows below --out

Arms: `separate`, an encoder for each modality; `alternate` and `together`, one encoder without pairs; `paired`, samples
of all parts; `shuffled`, likewise, with parts of other samples. All have the FLOPs of `together` (of samples as long as
the recipe allows), the sizes, targets and masks of `tiny2_joint`, and see the same samples. Sets: `concepts`, the joint
demo with the extra `joint`, held-out concepts; `digits`, handwritten ones of scikit-learn with spoken ones of human
voices (DIR holds fsdd/recordings/LABEL_SPEAKER_TAKE.wav, or an archive of it) and their names.

A row holds, for every modality, k-NN and a linear probe (concepts: of the category, digits: of the digit), and for
every two, in the same space and through a ridge map, of concepts how often the partner is among the ten nearest (R@10),
of digits which share of the ten nearest is of the same digit (P@10). Each also for the encoder as it began. A finished
arm is a file of --rows, joint_SET_STEPS/ARM-seed-N.json; while recipe and data stay the same a call keeps it.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from evidence_jobs import ROOT, run_all_forked, train_forked
from evidence_joint_scores import retrieval_of, scores_of
from evidence_joint_sets import SETS, JointSet
from evidence_joint_table import written
from evidence_sets import default_folder

from d2v_scale.errors import EXIT_BAD_INPUT, UserError
from d2v_scale.files import write_whole
from d2v_scale.process.started import MEASURE
from d2v_scale.tracking.environment import git_revision

if TYPE_CHECKING:
    from d2v_scale.recipe import Recipe

ROWS = ROOT / "docs" / "evidence"
STEMS = ("vision", "speech", "text")
ARMS = ("separate", "alternate", "together", "paired", "shuffled")
SEEDS, STEPS = 3, 800
QUICK_STEPS = 2
HIDE_WHOLE = 0.3
BATCH = 16


def recipe_of(arm: str, stems: tuple[str, ...], data: JointSet) -> dict[str, Any]:
    """The recipe's tables, but for how long it runs. `stems`: one of `separate`, else all."""
    with (ROOT / "d2v_scale" / "recipes" / "tiny2_joint.yaml").open() as stream:
        recipe: dict[str, Any] = yaml.safe_load(stream)
    recipe |= {"name": f"joint_{arm}", "global_batch_size": BATCH}
    for stem in set(STEMS) - set(stems):
        del recipe["model"][stem]
        recipe["objective"].pop(stem, None)
    if arm in ("paired", "shuffled"):
        shards = data.shuffled if arm == "shuffled" else data.train
        sources: list[dict[str, Any]] = [{"shards": shards, "modality": list(STEMS), "hide_whole": HIDE_WHOLE}]
    else:
        sources = [{"shards": data.train, "modality": stem} for stem in stems]
    if arm == "together":
        recipe["data"]["mixing"], recipe["accumulation"] = "together", len(stems)
    recipe["data"] |= {"sources": sources, "workers": 0}
    recipe["evaluation"] = {}
    recipe["tracking"] = {"enabled": False, "plot_every": None}
    return recipe


def lasting(recipe: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The recipe with so many steps; warm-up and the teacher's annealing keep their share of them."""
    found = copy.deepcopy(dict(recipe))
    share = steps / found["optim"]["max_steps"]
    found["optim"] |= {"max_steps": steps, "warmup_steps": int(share * found["optim"]["warmup_steps"])}
    found["objective"]["ema"]["anneal_steps"] = max(1, round(share * found["objective"]["ema"]["anneal_steps"]))
    found["checkpoint"] = {"every": steps}
    return found


def parsed(recipe: Mapping[str, Any], path: Path) -> "Recipe":
    """What train.py will make of these tables, which are written to `path`."""
    from d2v_scale.command_line import parse

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    return parse([f"--recipe={path}"])[0]


def longest_step_flops(recipe: "Recipe") -> float:
    """FLOPs of an optimizer step, student and teacher, of samples as long as they may be; a mean over steps. Not of
    the mean samples of the shards, as `planning.compute.step_flops`: rows that are recorded have these steps."""
    from d2v_scale.planning.flops import cost_of

    sources = recipe.data.sources
    whole = 1.0 if recipe.data.mixing == "together" else sum(source.weight for source in sources)
    return sum(
        (1.0 if recipe.data.mixing == "together" else source.weight / whole)
        * (source.batch_size or recipe.global_batch_size)
        * cost_of(recipe, source.modality).total
        for source in sources
    )


@dataclass(frozen=True)
class JointJob:
    """A row: an arm on a set at a seed."""

    data: JointSet
    arm: str
    seed: int
    steps: int
    """Of `together`."""
    rows: Path
    out: Path

    @property
    def name(self) -> str:
        return f"{self.data.name}-{self.arm}-s{self.seed}"

    @property
    def result(self) -> Path:
        return self.rows / f"joint_{self.data.name}_{self.steps}" / f"{self.arm}-seed-{self.seed}.json"

    @cached_property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """By what is trained: one of `joint`, or one of each stem."""
        scratch = self.out / "recipes" / f"{self.name}.yaml"
        if self.arm == "separate":  # each stem the steps that it has in `together`, which are its share of the FLOPs
            return {stem: lasting(recipe_of(self.arm, (stem,), self.data), self.steps) for stem in STEMS}
        budget = self.steps * longest_step_flops(parsed(recipe_of("together", STEMS, self.data), scratch))
        recipe = recipe_of(self.arm, STEMS, self.data)
        return {"joint": lasting(recipe, max(1, round(budget / longest_step_flops(parsed(recipe, scratch)))))}

    @cached_property
    def digest(self) -> str:
        """Of recipes, data and seed. Not of the code, which a row names by its commit."""
        said = copy.deepcopy(self.recipes)
        for recipe in said.values():
            for source in recipe["data"]["sources"]:
                source["shards"] = Path(source["shards"]).name  # wherever it lies
        state = hashlib.sha256(json.dumps([said, self.seed], sort_keys=True).encode())
        for index in (self.data.train, self.data.test, *([self.data.shuffled] if self.arm == "shuffled" else [])):
            state.update(Path(index).read_bytes())
        return state.hexdigest()[:16]

    def is_done(self) -> bool:
        return self.result.is_file() and json.loads(self.result.read_text())["digest"] == self.digest


def measure(job: JointJob) -> dict[str, Any]:
    """Train, and write the row. Runs in a process of its own."""
    from d2v_scale.evaluation.frozen import FrozenEncoder
    from d2v_scale.parallel.groups import single_process

    began = time.monotonic()
    directories: dict[str, Path] = {}
    row: dict[str, Any] = {"set": job.data.name, "arm": job.arm, "seed": job.seed, "digest": job.digest}
    row |= {"commit": git_revision(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "runs": {}}
    recipes = {}
    for name, said in job.recipes.items():
        path = job.out / "recipes" / f"{job.name}-{name}-{job.digest}.yaml"
        recipes[name] = parsed(said | {"seed": job.seed}, path)
        directories[name] = job.out / "runs" / path.stem
        records = train_forked([f"--recipe={path}"], directories[name], path.stem)
        steps = recipes[name].optim.max_steps
        row["runs"][name] = {
            "steps": steps,
            "flops": steps * longest_step_flops(recipes[name]),
            "last": last_losses(records),
        }
    single_process()
    encoders = {name: FrozenEncoder.load(directory) for name, directory in directories.items()}
    row["stems"], row["pairs"] = scores_of(job.data, {stem: encoders.get(stem) or encoders["joint"] for stem in STEMS})
    row |= random_scores(job, recipes) | {"retrieval": retrieval_of(job.data)}
    for name in ("knn", "linear"):
        row[name] = sum(one[name] for one in row["stems"].values()) / len(STEMS)
    row["minutes"] = (time.monotonic() - began) / 60
    job.result.parent.mkdir(parents=True, exist_ok=True)
    job.result.write_text(json.dumps(row, indent=1) + "\n")
    return row


def random_scores(job: JointJob, recipes: "Mapping[str, Recipe]") -> dict[str, Any]:
    """Of the encoders as they began. Measured once a seed: initial weights follow from seed and name, so that every arm
    begins with the same ones."""
    from d2v_scale.evaluation.frozen import FrozenEncoder

    path = job.out / "random" / f"{job.data.name}-{initial_digest(job, recipes)}.json"
    if not path.is_file():
        encoders = {stem: FrozenEncoder.untrained(recipes.get(stem) or recipes["joint"]) for stem in STEMS}
        stems, pairs = scores_of(job.data, encoders)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"random_stems": stems, "random_pairs": pairs}))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def initial_digest(job: JointJob, recipes: "Mapping[str, Recipe]") -> str:
    """Of what `random_scores` depends on: seed, encoder and samples, not the arm."""
    state = hashlib.sha256(str(job.seed).encode())
    for stem in STEMS:
        model = (recipes.get(stem) or recipes["joint"]).model
        # That samples are paired adds what no part has by itself.
        state.update(repr((model.backbone, dataclasses.replace(model.stems[stem], paired=None))).encode())
    for index in job.data.both:
        state.update(Path(index).read_bytes())
    return state.hexdigest()[:16]


def last_losses(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of the last step that has any: records of pictures and checkpoints follow it."""
    step = next(record for record in reversed(records) if "loss" in record)
    return {key: value for key, value in step.items() if key == "loss" or key.startswith("loss/")}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, help=f"default: {SEEDS}, with --quick 1")
    parser.add_argument("--steps", type=int, help=f"of `together`; default: {STEPS}, with --quick {QUICK_STEPS}")
    parser.add_argument(
        "--data", type=Path, help="folder of the spoken digits; default: data here or in a folder beside"
    )
    parser.add_argument(
        "--rows", type=Path, help="folder of the rows; default: docs/evidence, with --quick below --out"
    )
    parser.add_argument("--out", type=Path, help="shards and runs; default: out/evidence-joint, with --quick ...-quick")
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Prepare, run what is not there, print the tables of all rows."""
    options = make_parser().parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault(MEASURE, "0")  # what is compared is computed alike
    quick = options.quick
    steps = options.steps or (QUICK_STEPS if quick else STEPS)
    seeds = options.seeds or (1 if quick else SEEDS)
    out = (options.out or ROOT / "out" / ("evidence-joint-quick" if quick else "evidence-joint")).resolve()
    rows = (options.rows or (out / "rows" if quick else ROWS)).resolve()
    try:
        if min(steps, seeds, options.jobs) < 1:
            raise UserError("--steps, --seeds and --jobs must be positive.")
        folder = (options.data or default_folder(ROOT)).resolve() if "digits" in options.sets else Path()
        sets = [SETS[name](folder, out) for name in options.sets]
        jobs = [
            JointJob(data, arm, seed, steps, rows, out)
            for seed in range(seeds)
            for data in sets
            for arm in options.arms
        ]
        _import_all()
        run_all_forked(jobs, measure, options.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print("\n" + written(rows))
    return 0


def _import_all() -> None:
    """What every process needs, before any is forked."""
    import deepspeed  # noqa: F401
    import torch

    import d2v_scale.alignment.features
    import d2v_scale.train  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
