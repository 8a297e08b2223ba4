"""slurm/make_shards.sh on a real Slurm: an array whose tasks make a set of shards together."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cluster import wait_until
from jobs import ENDED, STAND_IN, Program, Workplace
from PIL import Image

pytestmark = pytest.mark.slurm

Make = Callable[[Program], Workplace]


def pictures(folder: Path, count: int) -> Path:
    """Pictures in two folders."""
    for k in range(count):
        path = folder / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), k, dtype=np.uint8)).save(path)
    return folder


def submit(place: Workplace, *arguments: object, array: str = "0-1") -> list[str]:
    """Submits and waits; the states of the tasks."""
    command = ["sbatch", "--parsable", f"--array={array}", "--cpus-per-task=1", f"--output={place.dir}/%a.out"]
    job = place.cluster.run(*command, "slurm/make_shards.sh", *map(str, arguments), cwd=place.dir).strip()
    first, _, last = array.partition("-")
    tasks = [f"{job}_{k}" for k in range(int(first), int(last or first) + 1)]
    wait_until(lambda: all(place.cluster.state(task) in ENDED for task in tasks), 300, said(place))
    return [place.cluster.state(task) for task in tasks]


def said(place: Workplace) -> str:
    return "\n".join(path.read_text() for path in sorted(place.dir.glob("*.out")))


def test_tasks_of_an_array_end_in_one_index(workplace: Make, tmp_path: Path) -> None:
    place = workplace(STAND_IN)
    source, out = pictures(tmp_path / "raw", 12), tmp_path / "shards"
    assert submit(place, source, out, "--per_shard", 4) == ["COMPLETED"] * 2, said(place)
    index = json.loads((out / "train.index.json").read_text())
    assert (index["totals"]["samples"], index["classes"], len(index["shards"])) == (12, ["a", "b"], 3)


@pytest.mark.slow
def test_what_a_task_has_not_done_is_done_when_the_array_is_submitted_again(workplace: Make, tmp_path: Path) -> None:
    place = workplace(STAND_IN)
    source, out = pictures(tmp_path / "raw", 12), tmp_path / "shards"
    (source / "a" / "0.png").write_bytes(b"no picture")
    assert sorted(submit(place, source, out, "--per_shard", 4)) == ["COMPLETED", "FAILED"], said(place)
    assert "more than --max_bad" in said(place)
    assert not (out / "train.index.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(times) == 3
    pictures(source, 1)
    assert submit(place, source, out, "--per_shard", 4) == ["COMPLETED"] * 2, said(place)
    assert json.loads((out / "train.index.json").read_text())["totals"]["samples"] == 12
    again = [name for name, time in times.items() if (out / name).stat().st_mtime_ns != time]
    assert len(again) == 1, "the shard of the file that was mended"
