"""Pairs of a pretrained encoder and its own random start, seed by seed, on sets of arrays: `evidence.py --pairs`.

DIR holds, as folders or in archives (*.tar.gz),
  fsdd/recordings/LABEL_SPEAKER_TAKE.wav        test: takes 0-4 of every label and speaker
  cifar10/{train,test}/CLASS/*.jpg
  JapaneseVowels/ and OSULeaf/{train,test}/CLASS/*.npy
The moving digits are the demo's. A result is a file of --rows, ARM/seed-N.json; those that are there are kept while
recipe and data are the same, so that an interrupted call goes on. Every result names the commit that made it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from evidence_jobs import ROOT, run_all_forked, train_forked
from evidence_pairs_table import against_fixed, comparison, table
from evidence_sets import RealSet, array_folders, image_arrays, prepare

from d2v_scale.conversion import demo
from d2v_scale.errors import UserError
from d2v_scale.tracking.environment import git_revision

ROWS = ROOT / "docs" / "evidence"
SEEDS = 5
MAX_TRAIN, MAX_TEST = 5000, 2000


@dataclass(frozen=True)
class Arm:
    """A recipe on a set."""

    title: str
    shards: str
    """The set, as `_SHARDS` names it."""
    stem: str
    """The recipe's, that reads it."""
    recipe: str | None = None
    """Of the package; None: `recipe.yaml` beside the rows."""
    frames: bool = False
    """Whether the mean of the raw samples over their first axis is a baseline of its own."""


ARMS = {
    "digits_waveform": Arm("spoken digits, waveform", "fsdd", "speech", "tiny2_speech"),
    "digits_log_mel": Arm("spoken digits, log-mel", "fsdd", "mel", "tiny2_mel"),
    "japanese_vowels": Arm("JapaneseVowels", "JapaneseVowels", "vowels"),
    "osu_leaf": Arm("OSULeaf", "OSULeaf", "outline"),
    "cifar_arrays": Arm("CIFAR-10 as arrays", "cifar10", "image"),
    "moving_digits": Arm("moving digits, direction", "video", "video", "demo_video", frames=True),
}
AGAINST = (("digits_log_mel", "digits_waveform"),)
"""Arms of one set that are compared, seed by seed."""


@dataclass(frozen=True)
class PairJob:
    """One row of an arm: what it found at a seed; `seed` None: without a model."""

    arm_name: str
    seed: int | None
    train: str
    """Index file of the training part."""
    test: str
    rows: Path
    out: Path

    @property
    def arm(self) -> Arm:
        return ARMS[self.arm_name]

    @property
    def name(self) -> str:
        return f"{self.arm_name}-{'raw' if self.seed is None else f's{self.seed}'}"

    @property
    def result(self) -> Path:
        return self.rows / self.arm_name / ("raw.json" if self.seed is None else f"seed-{self.seed}.json")

    @property
    def recipe(self) -> str:
        """Name or path."""
        return self.arm.recipe or str(self.rows / self.arm_name / "recipe.yaml")

    @property
    def recipe_digest(self) -> str:
        """Of what the recipe says, comments aside."""
        named = ROOT / "d2v_scale" / "recipes" / f"{self.arm.recipe}.yaml"
        said = yaml.safe_load((named if self.arm.recipe else Path(self.recipe)).read_text())
        return _sha256(json.dumps(said, sort_keys=True).encode())

    @cached_property
    def digest(self) -> str:
        """Of recipe, data and seed. Not of the code, which a row names by its commit."""
        data = b"".join(Path(index).read_bytes() for index in (self.train, self.test))
        return _sha256(data + repr((self.recipe_digest, self.arm_name, self.seed)).encode())

    def is_done(self) -> bool:
        return self.result.is_file() and json.loads(self.result.read_text())["digest"] == self.digest

    def arguments(self) -> list[str]:
        """Of train.py. Nothing is evaluated on the way."""
        seed = () if self.seed is None else (f"--seed={self.seed}",)
        off = ("--evaluation.train=null", "--evaluation.test=null", "--tracking.enabled=false", "--data.workers=0")
        off += ("--tracking.plot_every=null",)
        return [f"--recipe={self.recipe}", f"--data={self.arm.stem}={self.train}", *seed, *off]


def measure(job: PairJob) -> dict[str, Any]:
    """Do one job and write its row. Runs in a process of its own."""
    from d2v_scale.command_line import parse
    from d2v_scale.data.labelled import LabelledSet
    from d2v_scale.evaluation.features import extract
    from d2v_scale.evaluation.frozen import FrozenEncoder
    from d2v_scale.evaluation.probes import score
    from d2v_scale.evaluation.raw import raw_features
    from d2v_scale.parallel.groups import single_process

    began = time.monotonic()
    directory = job.out / "runs" / f"{job.name}-{job.digest}"
    records = [] if job.seed is None else train_forked(job.arguments(), directory, job.name)
    recipe, _ = parse(job.arguments())
    single_process()
    parts = [
        LabelledSet(shards, job.arm.stem, recipe.data, recipe.model, limit=limit)
        for shards, limit in ((job.train, MAX_TRAIN), (job.test, MAX_TEST))
    ]
    row: dict[str, Any] = {"arm": job.arm_name, "seed": job.seed, "digest": job.digest, "recipe": job.recipe_digest}
    row |= {"commit": git_revision(), "date": time.strftime("%Y-%m-%d", time.gmtime())}

    def of(encoder: FrozenEncoder) -> dict[str, float]:
        a, b = (extract(encoder.hidden_states, part, encoder.valid_positions, encoder.device) for part in parts)
        return score(a.last(4), a.labels_n, b.last(4), b.labels_n)

    if job.seed is None:
        (x, x_labels), (y, y_labels) = (raw_features(part, recipe.model) for part in parts)
        row |= score(x, x_labels, y, y_labels, best_of_plain_and_whitened=True)
        row |= {"train_samples": len(x), "test_samples": len(y), "classes": len(parts[0].classes)}
        row["largest_class"] = float(y_labels.bincount().max() / len(y_labels))
        if job.arm.frames:
            means = [_mean_frames(part) for part in parts]
            row["mean_frame"] = score(means[0], x_labels, means[1], y_labels, best_of_plain_and_whitened=True)
    else:
        row |= {f"random_{key}": value for key, value in of(FrozenEncoder.untrained(recipe)).items()}
        losses = [record["loss"] for record in records if "loss" in record]
        row |= of(FrozenEncoder.load(directory))
        row |= {"steps": recipe.optim.max_steps, "first_loss": losses[0], "last_loss": losses[-1]}
        row["target_rank"] = [record["target_rank"] for record in records if "target_rank" in record][-1]
    row["minutes"] = (time.monotonic() - began) / 60
    job.result.parent.mkdir(parents=True, exist_ok=True)
    job.result.write_text(json.dumps(row, indent=1) + "\n")
    return row


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _mean_frames(part: Iterable[Any]) -> Any:
    """(N, values of a frame): the mean over the first axis of each sample."""
    import torch

    return torch.cat([batch.inputs.float().mean(dim=2).flatten(1) for batch, _ in part])


def _fsdd(data: Path, out: Path) -> RealSet:
    return prepare(data, out, ["speech"])["speech"]


def _video(data: Path, out: Path) -> RealSet:
    del data
    return RealSet.in_folder("array", "moving digits", demo.write("video", out / demo.ROOT))


_SHARDS: dict[str, Callable[[Path, Path], RealSet]] = {
    "fsdd": _fsdd,
    "JapaneseVowels": lambda data, out: array_folders("JapaneseVowels", data, out),
    "OSULeaf": lambda data, out: array_folders("OSULeaf", data, out),
    "cifar10": lambda data, out: image_arrays("cifar10", data, out),
    "video": _video,
}


def run_pairs(names: list[str], seeds: int, data: Callable[[], Path], rows: Path, out: Path, processes: int) -> str:
    """Find all rows of these arms that are not there, seed by seed; the table. Raises UserError."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise UserError(f"--pairs names {unknown[0]}, which is none.", f"There is {', '.join(ARMS)}.")
    arms = names or list(ARMS)
    folder = data() if any(ARMS[name].shards != "video" for name in arms) else Path()
    sets = {shards: _SHARDS[shards](folder, out) for shards in dict.fromkeys(ARMS[name].shards for name in arms)}
    jobs = [
        PairJob(name, seed, sets[ARMS[name].shards].train, sets[ARMS[name].shards].test, rows, out)
        for seed in (None, *range(seeds))
        for name in arms
    ]
    _import_all()
    run_all_forked(jobs, measure, processes)
    return written(rows, seeds)


def _import_all() -> None:
    """What every process needs, before any is forked."""
    import deepspeed  # noqa: F401
    import torch

    import d2v_scale.data.labelled
    import d2v_scale.evaluation.frozen
    import d2v_scale.train  # noqa: F401

    torch.set_num_threads(1)


def written(rows: Path, seeds: int = SEEDS) -> str:
    """The table of the arms all of whose rows are there; empty where none is."""
    found = {name: _rows_of(rows / name) for name in ARMS}
    found = {name: some for name, some in found.items() if len(some) >= seeds}
    if not found:
        return ""
    raw = {name: json.loads((rows / name / "raw.json").read_text()) for name in found}
    titles = {name: ARMS[name].title for name in found}
    text = table(found, raw, titles) + "\n"
    for name, other in AGAINST:
        if name in found and other in found:
            text += comparison(found, name, other, titles)
    for name, of_arm in found.items():
        if "mean_frame" in raw[name]:
            text += against_fixed(of_arm, raw[name]["mean_frame"], titles[name], "the mean frame")
    return text


def _rows_of(folder: Path) -> list[dict[str, Any]]:
    """By seed."""
    found = [json.loads(path.read_text()) for path in folder.glob("seed-*.json")]
    return sorted(found, key=lambda row: row["seed"])
