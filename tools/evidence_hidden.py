"""What of a part that is hidden altogether is told from the others: have pairs something to teach, and did they?

  python tools/evidence_hidden.py RUN [RUN ...] --set digits [--data DIR] [--out DIR] [--rows DIR]

RUN: a run of tools/evidence_joint.py on samples of all parts, or a checkpoint of one; --data and --out are what made
it. Of held-out samples one part is hidden; it is predicted from one of the others, the third hidden too, and from both:

  told    what a sample's own others make better than those of another sample of another concept (digit), as a share of
          the variance of the targets about their mean at every position over samples. What is told by position, by
          length and by any sample's others is no matter of pairs, and is in neither.
  found   which share of the ten targets that are nearest to the predictions is of the same concept, of what could be;
  other   likewise, predicted from the other sample's.
  mixed   how much of a part's targets the other parts change, by the norm of the teacher's taps: half the mean squared
          difference between the targets beside its own others and beside another sample's, as a share of the variance;
  known   the ceiling: which share of that variance is between concepts, all that a partner can know, by that norm.

Targets are of whole samples; what is shown is masked as in training. A checkpoint is a file of --rows; the
tables are of all that are there.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence_jobs import ROOT
from evidence_joint_scores import retrieval_of, scores_of
from evidence_joint_sets import SETS, JointSet
from evidence_sets import default_folder

from d2v_scale.errors import EXIT_BAD_INPUT, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from d2v_scale.batch import Batch
    from d2v_scale.networks.stack import Student, Teacher
    from d2v_scale.recipe import Recipe

NORMS = ("instance", "layer", "batch", "none")
NEAREST = 10
_WAYS = ("same", "mapped")
_PROBED = ("vision", "speech")
_BATCH = 16
"""As in training: norms over positions have a batch's padding in their statistics."""


class HeldOut:
    """Masked batches of samples, and batches in which all parts but one are another sample's of another concept."""

    def __init__(self, data: JointSet, recipe: "Recipe", limit: int | None = None) -> None:
        import numpy as np

        from d2v_scale import modalities
        from d2v_scale.alignment.concepts import read_set
        from d2v_scale.data.paired import PairedCollator
        from d2v_scale.modalities.paired.modality import Paired

        [source] = recipe.data.sources
        sequence = modalities.of(recipe.model, "+".join(source.stems))
        assert isinstance(sequence, Paired)
        self.stems = source.stems
        concept = data.label if data.interchangeable else data.concept
        found = read_set(data.test, sequence.contents, concept, None)
        decoder = sequence.build_decoder(recipe.data, found.tokenizer)
        drawn = np.random.default_rng(0).permutation(len(found.places))[:limit]
        self._places = [found.places[k] for k in drawn]
        self._values = [decoder.evaluation_row(found.shards.read(one.shard, one.number)) for one in self._places]
        self.concepts = [place.concept for place in self._places]
        self._collator = PairedCollator(
            sequence, decoder, [recipe.masking_of(stem) for stem in source.stems], None, seed=0
        )

    def batches(self, own: str | None = None) -> "Iterator[Batch]":
        """`own`: the stem whose part is the sample's own; None: all."""
        for first in range(0, len(self._places), _BATCH):
            yield self._batch(range(first, min(first + _BATCH, len(self._places))), own)

    def _batch(self, numbers: range, own: str | None) -> "Batch":
        import numpy as np

        from d2v_scale.shards.plan import PlannedBatch
        from d2v_scale.shards.rows import Row

        rows = []
        for k in numbers:
            of_others = self._values[k if own is None else self._another(k, numbers)]
            values = [self._values[k][part] if stem == own else of_others[part] for part, stem in enumerate(self.stems)]
            rows.append(Row(self._places[k].key, tuple(values)))  # type: ignore[arg-type]
        items = np.array(numbers)
        planned = PlannedBatch(0, np.zeros_like(items), np.zeros_like(items), items)
        return self._collator.batch(rows, planned, list(range(len(rows))), step=0, source="held out", lost=0)

    def _another(self, k: int, numbers: range) -> int:
        """The next sample of the batch that is of another concept."""
        around = [*range(k + 1, numbers.stop), *range(numbers.start, k)]
        return next(other for other in around if self.concepts[other] != self.concepts[k])


def hiding(batch: "Batch", stems: Sequence[str]) -> "Batch":
    """The batch with the parts of these stems hidden altogether in every row."""
    import torch

    from d2v_scale.data.paired import joined, with_queries

    parts = []
    for part in batch.parts:
        hidden_r = torch.full((len(part.masked_rt),), part.modality in stems)
        real_rt = torch.ones_like(part.masked_rt)
        if part.real_bt is not None:
            real_rt = part.real_bt.repeat_interleave(part.clones, dim=0)
        masked_rt = part.masked_rt | hidden_r[:, None] & real_rt
        layout = with_queries(part.masked_rt, hidden_r, part.real_bt)
        parts.append(dataclasses.replace(part, masked_rt=masked_rt, hidden_r=hidden_r, layout=layout))
    return joined(tuple(parts), batch.modality, source=batch.source)


def predictions_of(student: "Student", batches: "Iterator[Batch]", hidden: str, shown: Sequence[str]) -> "Tensor":
    """(N, T, D): what of the part `hidden` is predicted where only `shown` are not hidden, mean over masks; NaN where
    there is no position. T: of the longest batch."""
    import torch

    from d2v_scale.networks.draw import Draw

    found = []
    with torch.no_grad():
        for whole in batches:
            batch = hiding(whole, [part.modality for part in whole.parts if part.modality not in shown])
            output = student(batch, Draw(0, 0))
            each = iter([output.predictions_nd, *output.further])
            by_stem = {part.modality: next(each) for part in batch.parts}
            part = next(part for part in batch.parts if part.modality == hidden)
            predicted_nd = part.layout.predicted(by_stem[hidden])
            rows, length = part.masked_rt.shape
            all_nd = predicted_nd.new_full((rows * length, predicted_nd.shape[1]), torch.nan)
            all_nd[part.layout.predicted_n] = predicted_nd
            found.append(all_nd.view(-1, part.clones, length, predicted_nd.shape[1]).mean(dim=1))
    return _stacked(found)


def targets_of(teacher: "Teacher", batches: "Iterator[Batch]") -> "dict[str, Tensor]":
    """By stem (N, T, D), NaN where there is no position."""
    import torch

    found: dict[str, list[Tensor]] = {}
    for batch in batches:
        for part, made in zip(batch.parts, teacher.make(batch), strict=True):
            targets_btd = made.targets_btd
            if part.real_bt is not None:
                targets_btd = torch.where(part.real_bt[..., None], targets_btd, torch.nan)
            found.setdefault(part.modality, []).append(targets_btd)
    return {stem: _stacked(some) for stem, some in found.items()}


def _stacked(some: "Sequence[Tensor]") -> "Tensor":
    import torch
    import torch.nn.functional as F

    longest = max(len(x_btd[0]) for x_btd in some)
    filled = [F.pad(x_btd, (0, 0, 0, longest - x_btd.shape[1]), value=torch.nan) for x_btd in some]
    return torch.cat(filled).double()


def variance(x_ntd: "Tensor") -> "Tensor":
    """float64 (T, D): unbiased, about the mean at every position; 0 where fewer than two samples have one."""
    import torch

    count_td = x_ntd.isfinite().sum(dim=0)
    deviations_ntd = x_ntd - x_ntd.nanmean(dim=0)
    return torch.where(count_td > 1, deviations_ntd.nan_to_num().square().sum(dim=0) / (count_td - 1), 0.0)


def known_share(x_ntd: "Tensor", concepts: Sequence[str]) -> float:
    """Which share of the variance is between concepts: 1 - that within them, of positions that several samples of a
    concept have, by how many."""
    import torch

    total = within = 0.0
    variance_td = variance(x_ntd)
    for concept in dict.fromkeys(concepts):
        own_ntd = x_ntd[torch.tensor([one == concept for one in concepts])]
        degrees_td = (own_ntd.isfinite().sum(dim=0) - 1).clamp(min=0)
        within += float((degrees_td * variance(own_ntd)).sum())
        total += float((degrees_td * variance_td).sum())
    return 1 - within / total if total else float("nan")


def mixed_share(own_ntd: "Tensor", among_others_ntd: "Tensor") -> float:
    """Half the mean squared difference, as a share of the variance."""
    variance_td = variance(own_ntd)
    there_td = own_ntd.isfinite().sum(dim=0) * (variance_td > 0)
    squared_td = (own_ntd - among_others_ntd).square().nan_to_num().sum(dim=0) * (variance_td > 0)
    return float(squared_td.sum() / (2 * (variance_td * there_td).sum()))


def chance(concepts: Sequence[str]) -> float:
    """What is found of candidates in any order."""
    counts = [concepts.count(one) for one in concepts]
    return sum(NEAREST * n / len(concepts) / min(NEAREST, n) for n in counts) / len(counts)


def found_share(predicted_ntd: "Tensor", targets_ntd: "Tensor", concepts: Sequence[str]) -> float:
    """See above."""
    import torch

    from d2v_scale.alignment.measures import cosines, nearest

    means = (x_ntd.nanmean(dim=0).nan_to_num() for x_ntd in (predicted_ntd, targets_ntd))
    centred = [
        (x_ntd - mean_td).nan_to_num().flatten(1)
        for x_ntd, mean_td in zip((predicted_ntd, targets_ntd), means, strict=True)
    ]
    number = {concept: k for k, concept in enumerate(dict.fromkeys(concepts))}
    labels_n = torch.tensor([number[one] for one in concepts])
    same_nn = (labels_n[:, None] == labels_n).double()
    near_nn = nearest(cosines(*centred), NEAREST)
    return float(((near_nn * same_nn).sum(dim=1) / same_nn.sum(dim=1).clamp(max=NEAREST)).mean())


def measured(path: Path, data: JointSet, limit: int | None = None) -> dict[str, Any]:
    """The row of a checkpoint. Raises CheckpointError."""
    from d2v_scale.evaluation.frozen import FrozenEncoder
    from d2v_scale.interop.encoder_source import open_encoder, write_tensors
    from d2v_scale.model.parallel_linear import undivided
    from d2v_scale.model.teacher_parts import TeacherParts
    from d2v_scale.networks.stack import Student, Teacher

    of_student, of_teacher = open_encoder(path, "student"), open_encoder(path, "teacher")
    recipe = of_student.recipe

    def teacher(norm: str | None) -> "Teacher":
        targets = recipe.targets()
        if norm is not None:
            targets = {
                stem: [dataclasses.replace(one, layer_norm=norm, final_norm="none") for one in each]
                for stem, each in targets.items()
            }
        with undivided():
            made = Teacher(recipe.model, targets, TeacherParts())
        write_tensors(made, of_teacher, "")
        return made

    with undivided():
        student = Student(recipe.model, target_widths=recipe.target_widths()).eval()
    write_tensors(student, of_student, "")
    held_out = HeldOut(data, recipe, limit)
    row: dict[str, Any] = {"recipe": recipe.name, "seed": recipe.seed, "step": of_student.step}
    row |= {"of_steps": recipe.optim.max_steps, "samples": len(held_out.concepts)}
    stems, pairs = scores_of(data, dict.fromkeys(held_out.stems, FrozenEncoder.load(path)))
    row |= {"retrieval": retrieval_of(data), "stems": stems, "pairs": pairs}
    return row | shared_by({norm: teacher(norm) for norm in NORMS}, held_out) | told(student, teacher(None), held_out)


def shared_by(teachers: "Mapping[str, Teacher]", held_out: HeldOut) -> dict[str, Any]:
    """What targets have of the other parts, and of the concept, by the norm of the taps."""
    row: dict[str, Any] = {"known": {}, "mixed": {}}
    for norm, teacher in teachers.items():
        own = targets_of(teacher, held_out.batches())
        row["known"][norm] = {stem: known_share(x_ntd, held_out.concepts) for stem, x_ntd in own.items()}
        row["mixed"][norm] = {
            stem: mixed_share(x_ntd, targets_of(teacher, held_out.batches(stem))[stem]) for stem, x_ntd in own.items()
        }
    return row


def told(student: "Student", teacher: "Teacher", held_out: HeldOut) -> dict[str, Any]:
    """What the student tells of parts that are hidden."""
    targets = targets_of(teacher, held_out.batches())
    found: dict[str, Any] = {}
    for hidden, x_ntd in targets.items():
        total = float((variance(x_ntd) * x_ntd.isfinite().sum(dim=0)).sum())
        others = [stem for stem in held_out.stems if stem != hidden]
        for shown in [others, *([one] for one in others if len(others) > 1)]:
            own_ntd, of_another_ntd = (
                predictions_of(student, held_out.batches(own), hidden, shown) for own in (None, hidden)
            )
            error_n, other_n = (
                (y_ntd - x_ntd).square().nan_to_num().sum(dim=(1, 2)) for y_ntd in (own_ntd, of_another_ntd)
            )
            gain_n = (other_n - error_n) * len(x_ntd) / total
            found[f"{hidden} from {' and '.join(shown)}"] = {
                "told": float(gain_n.mean()),
                "error": float(gain_n.std() / len(gain_n) ** 0.5),
                "explained": 1 - float(error_n.sum()) / total,
                "found": found_share(own_ntd, x_ntd, held_out.concepts),
                "other": found_share(of_another_ntd, x_ntd, held_out.concepts),
            }
    return {"chance": chance(held_out.concepts), "told": found}


def written(rows: Path) -> str:
    """Markdown: what is told and found in each row, what there is to know in one, and what is retrieved in each."""
    found = [json.loads(path.read_text()) for path in sorted(rows.glob("*.json"))]
    named = [f"{one['recipe']}, seed {one['seed']}, step {one['step']:,} of {one['of_steps']:,}" for one in found]
    lines = _head(["hidden, from what", *named])
    for what in found[0]["told"]:
        told = [one["told"][what] for one in found]
        values = [[_percent(one[key]) for key in ("told", "error", "found", "other")] for one in told]
        lines.append(_line([what, *("{} ± {}, {} ({})".format(*each) for each in values)]))
    whole = next((one for one in reversed(found) if set(one["known"]) == set(NORMS)), found[-1])
    lines += ["", *_head(["part", *whole["known"]])]
    for stem in whole["stems"]:
        shares = [[_percent(whole[key][norm][stem]) for key in ("known", "mixed")] for norm in whole["known"]]
        lines.append(_line([stem, *map(", ".join, shares)]))
    pairs = list(found[0]["pairs"])
    retrieving = [f"{pair}, {way}" for pair in pairs for way in _WAYS]
    lines += ["", *_head([found[0]["retrieval"], *retrieving, *(f"{stem}, k-NN" for stem in _PROBED)])]
    for name, one in zip(named, found, strict=True):
        retrieved = [one["pairs"][pair][way] for pair in pairs for way in _WAYS]
        retrieved += [one["stems"][stem]["knn"] for stem in _PROBED]
        lines.append(_line([name, *map(_percent, retrieved)]))
    return "\n".join(lines) + "\n"


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:.1f}"  # no minus before zero


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--set", choices=list(SETS), required=True)
    parser.add_argument(
        "--data", type=Path, help="folder of the spoken digits; default: data here or in a folder beside"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "evidence-joint", help="where the shards are")
    parser.add_argument("--limit", type=int, help="held-out samples; default: all")
    parser.add_argument("--rows", type=Path, help="folder of the rows; default: docs/evidence/hidden_SET")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure every run."""
    options = make_parser().parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    from d2v_scale.parallel.groups import single_process

    single_process()
    try:
        folder = (options.data or default_folder(ROOT)).resolve() if options.set == "digits" else Path()
        data = SETS[options.set](folder, options.out.resolve())
        rows = options.rows or ROOT / "docs" / "evidence" / f"hidden_{options.set}"
        rows.mkdir(parents=True, exist_ok=True)
        for path in options.runs:
            row = measured(path, data, options.limit)
            name = f"{row['recipe']}-seed-{row['seed']}-step-{row['step']:05d}.json"
            (rows / name).write_text(json.dumps(row, indent=1) + "\n")
        print(written(rows))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
