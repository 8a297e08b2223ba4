"""What a run says when it ends, however it ends: what happened, what it is worth, and what to do next."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2v_scale.errors import EXIT_DONE, EXIT_LOST_PEER, EXIT_REQUEUE
from d2v_scale.redaction import redact
from d2v_scale.tracking.mirror_state import charts
from d2v_scale.tracking.names import by_stem, scores

_SHARES = ("accuracy", "wer", "knn_accuracy", "held_out_explained")
"""Figures that are said in percent."""
_NAMES = {
    "loss": "loss",
    "held_out_loss": "held-out loss",
    "held_out_explained": "held-out targets explained",
    "knn_accuracy": "k-NN accuracy",
}
"""Figures of pretraining by their record's names, in the order they are said in."""
Records = Sequence[Mapping[str, Any]]


def happened(code: int, reason: str, records: Records, verdict: str, *, is_task: bool) -> list[str]:
    """Lines for a run that ends with this exit code and reason; the first says how. `records`: all of its metrics;
    `verdict`: on its health."""
    verb = {EXIT_DONE: "Done", EXIT_REQUEUE: "Stopped", EXIT_LOST_PEER: "Stopped"}.get(code, "Failed")
    said = reason[:1].upper() + reason[1:] if reason.startswith(("stopped", "nothing")) else f"{verb}: {reason}"
    lines = [redact(said), *results(records, is_task=is_task)]
    return [*lines, f"Verdict: {verdict}"] if verdict else lines


def results(records: Records, *, is_task: bool) -> list[str]:
    """Lines on what a run is worth, of all and of each stem or source."""
    found = worth(records, is_task=is_task)
    return [f"Result{f' of {whose}' if whose else ''}: {', '.join(said)}" for whose, said in found.items()]


def described(happened: Sequence[str], header: Sequence[str]) -> str:
    """What a run says of itself, in Markdown: how it ended, where it has, and what it is."""
    return "\n\n".join([*happened, "\n".join(f"    {line}" for line in header)])


def closing(directory: Path, code: int, *, ends: bool) -> list[str]:
    """Lines on what can be done next: how to look at the charts, and commands. `ends`: its last step is done."""
    look = [f"Charts: {' then '.join(found)}"] if (found := charts(directory)) else []
    return look + [f"Next: {redact(command)}" for command in next_commands(directory, code, ends=ends)]


def worth(records: Records, *, is_task: bool) -> dict[str, list[str]]:
    """The last figures that say what a run is worth, and what it began with where that was measured: of all, and by
    stem or source where these have their own."""
    recorded = list(dict.fromkeys(name for record in records for name in record))
    if is_task:
        measured = ["loss", *scores(recorded)]
        said = [_said(records, name, name.removeprefix("test/")) for name in measured if name in recorded]
        return {"": said} if said else {}
    found: dict[str, list[str]] = {}
    for figure in _NAMES:
        for whose, name in by_stem(recorded, figure).items():
            found.setdefault(whose, []).append(_said(records, name, figure))
    return found


def _said(records: Records, name: str, figure: str) -> str:
    """The last and the first value of a name, which is of this figure, and what the last is to be compared with."""
    values = [record[name] for record in records if name in record]
    last = next(record["step"] for record in reversed(records) if name in record)
    text = f"{_NAMES.get(figure, f'held-out {figure}')} {_value(figure, values[-1])}"
    beside = []
    if last == 0 < records[-1]["step"]:
        beside.append("before the first step")
    elif last < records[-1]["step"] and figure != "loss":
        beside.append(f"at step {last}")
    # The loss of the first step is that of any random start; the others tell what was learned.
    if figure != "loss" and len(values) > 1:
        beside.append(f"{_value(figure, values[0])} at first")
    if figure == "knn_accuracy":
        for baseline, words in (("knn_raw", "with raw features"), ("knn_chance", "by chance")):
            other = name.replace(figure, baseline, 1)
            beside += [f"{_value(figure, r[other])} {words}" for r in records if other in r][-1:]
    return f"{text} ({', '.join(beside)})" if beside else text


def next_commands(directory: Path, code: int, *, ends: bool) -> list[str]:
    """Commands to paste, the likeliest first."""
    if code == EXIT_DONE and ends:
        return [f"d2v report {directory}", f"d2v export {directory} {directory / 'encoder'} --to hf"]
    if code in (EXIT_DONE, EXIT_REQUEUE, EXIT_LOST_PEER):
        if code != EXIT_DONE and "SLURM_JOB_ID" in os.environ:
            return []  # the job script decides whether it comes back
        return [f"d2v train --resume {directory}"]
    return [f"d2v report {directory}"]


def _value(metric: str, value: float) -> str:
    return f"{value:.1%}" if metric in _SHARES else f"{value:.4g}"
