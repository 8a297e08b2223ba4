"""Small runs that are healthy, and runs that a switch or bad data spoil in a known way: what the verdict is tried on.

    python tests/tracking/judged_runs.py FOLDER [NAME ...]

makes them (all, or these), each a fork of one process that has everything imported, and writes the figures that rules
read to `judged_runs.json`; FOLDER keeps their data and directories. Some ten minutes on one core.
"""

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_suffix(".json")
READ = {
    *("step", "hours", "loss", "lr", "decay", "grad_norm", "skipped_updates", "samples_per_second", "data_wait_share"),
    *("target_rank", "teacher_update_norm", "student_teacher_distance_relative", "data/planned", "data/lost"),
}
"""Figures that rules read,"""
OF_PARTS = {
    *("target_std", "prediction_std", "stem_std", "masked_share", "held_out_explained", "layer_likeness"),
    *("knn_accuracy", "knn_samples", "knn_chance"),
}
"""and those that each source or stem may have of its own."""

PRELOADED = (
    *("megatron.core.tensor_parallel", "d2v_scale.pretraining.program", "d2v_scale.finetuning.program"),
    *("d2v_scale.running.supervision", "d2v_scale.plots.samples", "d2v_scale.modalities.speech.decoder"),
)
"""What a run would otherwise import, for longer than it trains."""
STEPS = 16
SHORT = (
    "tracking.enabled=false",
    "tracking.log_every=1",
    "tracking.plot_every=null",
    f"optim.max_steps={STEPS}",
    "optim.warmup_steps=3",
)
FEW = ("evaluation.every=0", "evaluation.max_train=150", "evaluation.max_test=80", "evaluation.max_masked=32")
DATA = "demo_data/{0}/train.index.json"


@dataclass(frozen=True)
class Judged:
    """A run, and the signs of trouble that its verdict has to name; none of a healthy one."""

    recipe: str
    switches: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    """Signs that it may show, too, as they follow from the others."""
    beside: Callable[[int, Path], None] | None = None
    """Done to the process while it trains: of its pid and run directory."""


def stalled(pid: int, run_dir: Path) -> None:
    """For its last steps a run stands still most of the time, as one does whose disk or neighbour takes turns."""
    while '"step": 11' not in _text(run_dir / "metrics.jsonl"):
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(20)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.5)


WITH_SILENCE = (
    "data.sources=[{shards: demo_data/joint/train.index.json, modality: vision, name: pictures}, "
    "{shards: silent/train.index.json, modality: speech, name: silence}]"
)


def _on(name: str, *, tokens: bool = False, evaluated: bool = True) -> tuple[str, ...]:
    """Train a recipe that names no data on a demo's."""
    test = f"evaluation.test=demo_data/{name}/test.index.json"
    vocabulary = ("model.text.vocab_size=4096", "model.text.mask_id=4095") if tokens else ()
    labelled = (f"evaluation.train={DATA.format(name)}", test) if evaluated else ()
    return (f"data={DATA.format(name)}", *labelled, *vocabulary)


GOOD = {
    "vision": Judged("demo_vision"),
    "vision, another seed": Judged("demo_vision", ("seed=2",)),
    "vision, small batches": Judged("demo_vision", ("global_batch_size=8", "optim.lr=1e-3", "seed=3")),
    "vision, smooth masks": Judged("demo_vision", ("objective.masking.kind=random", "objective.masking.prob=0.6")),
    "vision 1.0, targets of blocks": Judged("tiny1_vision", _on("vision")),
    "vision 2.0": Judged("tiny2_vision", _on("vision")),
    "vision 2.0, another seed": Judged("tiny2_vision", (*_on("vision"), "seed=2", "objective.masking.prob=0.6")),
    "speech": Judged("demo_speech"),
    "speech, another seed": Judged("demo_speech", ("seed=2", "objective.masking.prob=0.5")),
    "speech 2.0": Judged("tiny2_speech", _on("speech")),
    "log-mel energies": Judged("tiny2_mel", _on("speech")),
    "text": Judged("demo_text"),
    "text, another seed": Judged("demo_text", ("seed=2", "optim.lr=2e-3")),
    "text 1.0": Judged("tiny1_text", _on("text", tokens=True)),
    "text 2.0": Judged("tiny2_text", _on("text", tokens=True)),
    "video": Judged("demo_video"),
    "video, another seed": Judged("demo_video", ("seed=2", "objective.masking.prob=0.6")),
    "joint": Judged("demo_joint"),
    "joint, all sources in a step": Judged(
        "demo_joint", ("data.mixing=together", "accumulation=3", "global_batch_size=48")
    ),
    "pairs": Judged("tiny2_joint"),
    "series": Judged("series.yaml"),
    "fine-tuning": Judged("finetune_digits"),
}
"""No sign may be found in these."""

GRAVE = (
    *("the loss", "the gradient", "the teacher", "a collapse", "the layers", "the labels", "the rank of the targets"),
    *("what was learned", "the held-out targets"),
)
"""What a divergence may show."""

BAD = {
    "learning rate too high, vision": Judged(
        "demo_vision",
        ("optim.lr=3",),
        ("what was learned",),
        ("the rank of the targets", "the held-out targets", *GRAVE),
    ),
    "learning rate too high, speech": Judged(
        "demo_speech",
        ("optim.lr=1", "optim.clip=1000"),
        ("a collapse",),
        ("what was learned", "the held-out targets", *GRAVE),
    ),
    "the teacher is the student, speech": Judged(
        "tiny2_speech",
        (*_on("speech"), "objective.ema.start=0", "objective.ema.end=0"),
        ("the teacher",),
        ("the held-out targets",),
    ),
    "the teacher is the student, vision": Judged(
        "demo_vision", ("objective.ema.start=0", "objective.ema.end=0"), ("the teacher",)
    ),
    "the loader is slow": Judged("demo_vision", ("data=large/train.index.json",), ("the loader",)),
    "silent recordings in a joint run": Judged(
        "demo_joint", ("data.mixing=together", "accumulation=2", WITH_SILENCE), ("a collapse",)
    ),
    "masks that hide next to nothing, text": Judged("demo_text", ("objective.masking.prob=0.01",), ("the masks",)),
    "masks that hide next to nothing, video": Judged("demo_video", ("objective.masking.prob=0.02",), ("the masks",)),
    "shuffled labels, vision": Judged(
        "demo_vision", ("evaluation.train=shuffled/train.index.json",), ("the labels",), ("what was learned",)
    ),
    "shuffled labels, speech": Judged(
        "demo_speech", ("evaluation.train=shuffled_speech/train.index.json",), ("the labels",), ("what was learned",)
    ),
    "damaged samples": Judged(
        "demo_vision", ("data=damaged/train.index.json", "data.max_bad_ratio=0.5"), ("lost samples",)
    ),
    "stalled": Judged("demo_vision", signs=("the speed",), beside=stalled),
}
"""Ways to spoil a run."""


def make(runs: dict[str, Judged], folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Train each in a fork of this process, one after another; its name and all of its records. What it said is in
    `<run>.log`; of one that did not train at all there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    import judged_data

    import d2v_scale.train as train
    from d2v_scale import command_line
    from d2v_scale.parallel import groups
    from d2v_scale.process.signals import StopFlag

    groups.prepare_accelerator()
    for name in PRELOADED:
        importlib.import_module(name)
    command_line.parse([])
    judged_data.write(Path())
    for number, (name, run) in enumerate(runs.items()):
        run_dir = Path(f"run-{number}-{name.replace(',', '').replace(' ', '-')}")
        shutil.rmtree(run_dir, ignore_errors=True)
        switches = (f"recipe={run.recipe}", f"run_dir={run_dir}", *SHORT, *FEW, _batch(run.recipe), *run.switches)
        pid = os.fork()
        if pid == 0:
            with open(f"{run_dir}.log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                code = train.main([f"--{switch}" for switch in switches], StopFlag.install())
            os._exit(code)
        if run.beside is not None:
            threading.Thread(target=run.beside, args=(pid, run_dir), daemon=True).start()
        os.waitpid(pid, 0)
        records = [json.loads(line) for line in _text(run_dir / "metrics.jsonl").splitlines()]
        if not any("loss" in record for record in records):
            print(f"{name} did not train:\n{_text(Path(f'{run_dir}.log'))[-2000:]}", file=sys.stderr)
        yield name, records


def _batch(recipe: str) -> str:
    """Small ones; of texts tokens."""
    return f"global_batch_size={512 if 'text' in recipe else 16}"


def columns(records: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """What rules read of records, to four digits."""
    names = dict.fromkeys(name for record in records for name in record)
    read = [name for name in names if name in READ or name.partition("/")[0] in OF_PARTS]
    return {name: [_short(record.get(name)) for record in records] for name in read}


def rows(columns: dict[str, list[float | None]]) -> list[dict[str, float]]:
    """The records that `columns` was made of."""
    each = zip(*columns.values(), strict=True)
    return [{name: x for name, x in zip(columns, row, strict=True) if x is not None} for row in each]


def _short(value: float | None) -> float | None:
    return None if value is None else value if isinstance(value, int) else float(f"{value:.4g}")


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> int:
    """Make the named runs, or all, say what is found of each, and record it; 1 where that is not what was expected."""
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    from d2v_scale.tracking.verdict import signs

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, default=RECORDED)
    options = parser.parse_args()
    runs, wrong = BAD | GOOD, 0
    recorded = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name, records in make({name: runs[name] for name in options.names or runs}, options.folder.resolve()):
        found = signs(records)
        seen, wanted = {sign.name for sign in found}, set(runs[name].signs)
        right = bool(records) and wanted <= seen <= wanted | set(runs[name].also)
        wrong += not right
        print("ok   " if right else "WRONG", name, [f"{sign.name}: {sign.said}" for sign in found], flush=True)
        recorded[name] = columns(records)
        ordered = [f"{json.dumps(name)}: {_line(recorded[name])}" for name in runs if name in recorded]
        options.out.write_text("{\n" + ",\n".join(ordered) + "\n}\n")
    return 1 if wrong else 0


def _line(columns: dict[str, list[float | None]]) -> str:
    return json.dumps(columns, separators=(",", ":"))


if __name__ == "__main__":
    sys.exit(main())
