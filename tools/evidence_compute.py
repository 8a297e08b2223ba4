"""Curves over compute: `evidence.py --compute 1,4,16`, old and new recipes on the same FLOPs.

A row is a set, a recipe, a compute and a seed: k-NN and a linear probe on frozen features (mean over positions, last
four blocks), the same of the random start, and fine-tuning on 1 % and 10 % of the labels beside the same network from
scratch on the same samples and steps. That is most of a short row: with --probes a row is without it, and a call
without --probes completes it. Seeds count from 3, since settings are chosen on 1 and 2. Compute 1 is the FLOPs of 1.0's
recipe of the modality; warm-up and the teacher's annealing stretch with the steps. A finished row is a file of --rows,
compute_SET/RECIPE-xCOMPUTE-seed-N.json, which a call keeps while recipe and data stay the same: an interrupted call
goes on. DIR holds
  cifar10/{train,test}/CLASS/*.jpg, and cifar10_large laid out alike: where it is there, both parts' images are learned
                                    from, and its test images are the test
  fsdd/recordings/LABEL_SPEAKER_TAKE.wav
  ag_news*.csv                      class, title, text, no header; test: every fifth row
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from evidence_compute_sets import SETS, CutSet, with_labels
from evidence_jobs import ROOT, fork, run_all_forked, train_forked
from evidence_sets import RealSet
from evidence_table import compute_table

from d2v_scale.errors import UserError
from d2v_scale.files import write_whole
from d2v_scale.model.stem_config import Kind
from d2v_scale.tracking.environment import git_revision

if TYPE_CHECKING:
    from d2v_scale.recipe import Recipe

RECIPES = ROOT / "d2v_scale" / "recipes"
OLD = ("tiny1", "tiny2")
SHARES = {"1": 0.01, "10": 0.1}
"""Of the labels, by what rows call them."""
MAX_TRAIN, MAX_TEST = 30000, 5000
FIRST_SEED = 3
"""Settings of recipes are chosen on seeds 1 and 2."""


@dataclass(frozen=True)
class FineTuning:
    """What a row's networks learn labels with; the same from scratch but for `layer_decay`, which is 1 there."""

    steps: int = 600
    batch_size: int = 32
    lr: float = 1e-3
    layer_decay: float = 0.75
    weight_decay: float = 0.05


FINE_TUNING = FineTuning()


def recipes_of(kind: Kind) -> list[str]:
    """The tiny recipes of this modality, 1.0, 2.0 and those that came later."""
    later = sorted(path.stem for path in RECIPES.glob(f"tiny[3-9]*_{kind}.yaml"))
    return [*(f"{version}_{kind}" for version in OLD), *later]


@dataclass(frozen=True)
class ComputeJob:
    """One row."""

    cut: CutSet
    recipe: str
    """Name, of the package."""
    compute: float
    seed: int
    rows: Path
    out: Path
    fine_tuning: FineTuning = FINE_TUNING
    learns_labels: bool = True
    """Whether the row is to say what fine-tuning comes to."""

    @property
    def name(self) -> str:
        # Without a point: what follows the last one of a run's folder is not in the names of the files beside it.
        return f"{self.cut.name}-{self.recipe}-x{self.compute:g}-s{self.seed}".replace(".", "_")

    @property
    def result(self) -> Path:
        file = f"{self.recipe}-x{self.compute:g}-seed-{self.seed}.json"
        return self.rows / f"compute_{self.cut.name}" / file

    @property
    def recipe_digest(self) -> str:
        """Of what the recipe says, and the one that sets its FLOPs, comments aside."""
        said = [yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) for name in (self.recipe, self._measure)]
        return _sha256(json.dumps(said, sort_keys=True).encode())

    @cached_property
    def data_digest(self) -> str:
        """Of the shards' indexes."""
        indexes = [index for real in self.cut.cuts for index in (real.train, real.test)]
        return _sha256(b"".join(Path(index).read_bytes() for index in indexes))

    @cached_property
    def digest(self) -> str:
        """Of recipe, data, compute, seed and how labels are learned. Not of the code, which a row names by its
        commit."""
        about = (self.recipe_digest, self.data_digest, self.compute, self.seed, asdict(self.fine_tuning))
        return _sha256(repr(about).encode())

    def is_done(self) -> bool:
        row = json.loads(self.result.read_text()) if self.result.is_file() else {}
        has_all = not self.learns_labels or all(f"finetuned_{share}" in row for share in SHARES)
        return row.get("digest") == self.digest and has_all

    @property
    def _measure(self) -> str:
        return f"{OLD[0]}_{self.cut.kind}"

    def steps(self, real: RealSet) -> tuple[int, float]:
        """Of pretraining on a cut, and their FLOPs: as many as bring the recipe to the same compute as 1.0's."""
        from d2v_scale.planning.compute import step_flops, steps_for

        first, own = _parsed(self._measure, real), _parsed(self.recipe, real)
        steps = steps_for(own, self.compute * first.optim.max_steps * step_flops(first))
        return steps, steps * step_flops(own)

    def arguments(self, real: RealSet) -> list[str]:
        """Of train.py, to pretrain on a cut. Nothing is evaluated on the way."""
        from d2v_scale.planning.compute import stretched

        steps, _ = self.steps(real)
        return [
            *(f"--recipe={self.recipe}", f"--data={real.train}", f"--seed={self.seed}", *_QUIET),
            *(f"--optim.max_steps={steps}", f"--checkpoint.every={min(steps, 2000)}"),
            *stretched(_parsed(self.recipe, real), steps),
        ]


_QUIET = (
    *("--tracking.enabled=false", "--tracking.plot_every=null", "--data.workers=0"),
    *("--evaluation.train=null", "--evaluation.test=null"),
)


def _parsed(recipe: str, real: RealSet) -> "Recipe":
    from d2v_scale.command_line import parse

    return parse([f"--recipe={recipe}", f"--data={real.train}"])[0]


def measure(job: ComputeJob) -> dict[str, Any]:
    """Do one job and write its row. Runs in a process of its own."""
    began = time.monotonic()
    found = [_of_cut(job, number, real) for number, real in enumerate(job.cut.cuts)]
    row: dict[str, Any] = {"set": job.cut.name, "recipe": job.recipe, "compute": job.compute, "seed": job.seed}
    row |= {"digest": job.digest, "recipe_digest": job.recipe_digest, "data_digest": job.data_digest}
    row |= {"commit": git_revision(), "date": time.strftime("%Y-%m-%d", time.gmtime()), "cuts": len(found)}
    row |= {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    row |= {"of_cuts": found, "fine_tuning": asdict(job.fine_tuning), "minutes": (time.monotonic() - began) / 60}
    job.result.parent.mkdir(parents=True, exist_ok=True)
    write_whole(job.result, json.dumps(row, indent=1) + "\n")
    return row


def _of_cut(job: ComputeJob, number: int, real: RealSet) -> dict[str, float]:
    """All figures of one cut; a mean over cuts has the same names."""
    steps, flops = job.steps(real)
    directory = job.out / "runs" / f"{job.name}-cut{number}-{job.digest}"
    records = train_forked(job.arguments(real), directory, f"{job.name}, cut {number},")
    hours = max(record["hours"] for record in records if "hours" in record)
    figures: dict[str, float] = {"steps": steps, "flops": flops, "hours": hours}
    figures |= _without_pretraining(job, number, real) | _probed(job, real, directory, directory)
    for name, share in SHARES.items() if job.learns_labels else ():
        figures[f"finetuned_{name}"] = _learned(job, real, share, Path(f"{directory}-labels-{name}"), directory)
    return figures


def _without_pretraining(job: ComputeJob, number: int, real: RealSet) -> dict[str, float]:
    """What compute does not change: of the random start, and from scratch on parts of the labels. Found once."""
    about = repr((job.recipe_digest, job.data_digest, job.seed, number, asdict(job.fine_tuning)))
    name = f"{job.cut.name}-{job.recipe}-s{job.seed}-cut{number}-{_sha256(about.encode())}"
    directory = job.out / "untrained" / name
    of_start = _probed(job, real, None, directory)
    figures = {f"random_{key}": of_start[key] for key in ("knn", "linear")}
    for share in SHARES if job.learns_labels else ():
        figures[f"scratch_{share}"] = _learned(job, real, SHARES[share], Path(f"{directory}-{share}"), None)
    return figures


def _probed(job: ComputeJob, real: RealSet, run: Path | None, beside: Path) -> dict[str, float]:
    """k-NN and linear probe of the encoder of this run, or of its random start (None). Found once, in a process of its
    own: what runs are forked from must have no process group."""
    path = Path(f"{beside}.probe.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        pid = fork(lambda: write_whole(path, json.dumps(_probe(job, real, run))))
        if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise UserError(f"The probe of {job.name} ended with code {code}.", "See above.")
    found: dict[str, float] = json.loads(path.read_text())
    return found


def _probe(job: ComputeJob, real: RealSet, run: Path | None) -> dict[str, float]:
    from d2v_scale.data.labelled import LabelledSet
    from d2v_scale.evaluation.features import extract
    from d2v_scale.evaluation.frozen import FrozenEncoder
    from d2v_scale.evaluation.probes import score
    from d2v_scale.parallel.groups import single_process

    single_process()
    recipe = _parsed(job.recipe, real)
    recipe.seed = job.seed
    encoder = FrozenEncoder.untrained(recipe) if run is None else FrozenEncoder.load(run)
    parts = [
        LabelledSet(shards, job.cut.kind, recipe.data, recipe.model, limit=limit)
        for shards, limit in ((real.train, MAX_TRAIN), (real.test, MAX_TEST))
    ]
    a, b = (extract(encoder.hidden_states, part, encoder.valid_positions, encoder.device) for part in parts)
    sizes = {"train_samples": float(len(a.labels_n)), "test_samples": float(len(b.labels_n))}
    return score(a.last(4), a.labels_n, b.last(4), b.labels_n) | sizes


def _learned(job: ComputeJob, real: RealSet, share: float, directory: Path, encoder: Path | None) -> float:
    """Accuracy on the test part after fine-tuning `encoder` (None: from scratch) on that share of the labels."""
    labels = job.out / "labels" / f"{job.cut.name}-{Path(real.train).parent.name}-{share:g}-s{job.seed}"
    recipe = fine_tuning_recipe(job, real, with_labels(real, share, job.seed, labels), from_scratch=encoder is None)
    path = directory.with_name(f"{directory.name}.yaml")  # a share in the name has a dot
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    start = () if encoder is None else (f"--init_from={encoder}",)
    records = train_forked([f"--recipe={path}", *start], directory, directory.name)
    return float(next(record["test/accuracy"] for record in reversed(records) if "test/accuracy" in record))


def fine_tuning_recipe(job: ComputeJob, real: RealSet, train: str, *, from_scratch: bool) -> dict[str, Any]:
    """The tables of a run that learns labels with the encoder of the job's recipe."""
    with (RECIPES / f"{job.recipe}.yaml").open() as stream:
        pretraining: dict[str, Any] = yaml.safe_load(stream)
    how = job.fine_tuning
    optim = {"lr": how.lr, "schedule": "cosine", "warmup_steps": how.steps // 10, "max_steps": how.steps}
    optim |= {"weight_decay": how.weight_decay, "clip": 4.0, "betas": [0.9, 0.98]}
    data = pretraining["data"] | {"workers": 0, "sources": [{"shards": train, "modality": job.cut.kind}]}
    return {
        "name": f"labels_{job.recipe}",
        "seed": job.seed,
        "global_batch_size": how.batch_size,
        "task": {"kind": "classify", "layer_decay": 1.0 if from_scratch else how.layer_decay},
        **({"model": pretraining["model"]} if from_scratch else {}),
        "data": data,
        "optim": optim,
        "checkpoint": {"every": how.steps},
        "tracking": {"enabled": False, "plot_every": None},
        "evaluation": {"test": real.test, "max_test": MAX_TEST},
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def computes_of(text: str) -> list[float]:
    """`1,4,16`. Raises UserError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < one < float("inf") for one in found):
        raise UserError(f"--compute {text} is no list of positive numbers.", "Give it as 1,4,16.")
    return list(dict.fromkeys(found))


def run_computes(
    computes: Sequence[float],
    names: Sequence[str],
    seeds: int,
    data: Path,
    rows: Path,
    out: Path,
    processes: int,
    *,
    learns_labels: bool = True,
) -> str:
    """Find all rows of these sets that are not there, the cheapest first; the table of all rows. Raises UserError."""
    sets = [SETS[name](data, out) for name in names]
    jobs = [
        ComputeJob(cut, recipe, compute, seed, rows, out, learns_labels=learns_labels)
        for compute in sorted(computes)
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        for cut in sets
        for recipe in recipes_of(cut.kind)
    ]
    _import_all()
    run_all_forked(jobs, measure, processes)
    return compute_table(rows)


def _import_all() -> None:
    """What every process needs, before any is forked."""
    import deepspeed  # noqa: F401
    import torch

    import d2v_scale.data.labelled
    import d2v_scale.evaluation.frozen
    import d2v_scale.train  # noqa: F401

    torch.set_num_threads(1)
