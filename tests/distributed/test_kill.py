"""SIGKILL at named points and at random times through the real training program; the run must end as if never killed.

Stage 0 stands for two pipeline stages. Targets with state are among what is trained on.

Long form: `pytest tests/distributed/test_kill.py -m slow` or `python tests/distributed/test_kill.py [KILLS]`, which
prints one line a kill.
"""

import itertools
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from launch import ROOT, Rank, start_ranks, stop
from paired_shards import paired_samples, write_pairs, write_recipe

from d2v_scale.checkpoint import Checkpoint, find_newest_valid
from d2v_scale.conversion import demo
from d2v_scale.running import arithmetic
from d2v_scale.tracking import read_records
from d2v_scale.tracking.account import KINDS, read_account

STEPS = 24
EVERY = 2
POINTS = {
    # point -> how often a rank passes it in the (first) few steps of a process
    "forward": [1, 2, 3],
    "backward": [1, 3],
    "optimizer": [1, 2],
    "ema": [1, 3],
    "snapshot": [1, 2],
    "shard_write": [1, 2, 3],
    "manifest": [1, 2],
    "rename": [1, 2],
    "marker": [1, 2],
    "retention": [1],
}
ONLY_RANK_0 = ("manifest", "rename", "marker", "retention")


STATE = (
    "[{top_k_layers: 2, final_norm: layer}, {kind: codes, weight: 0.5, top_k_layers: 2, options: {codes: 16}}, "
    "{kind: whitened, weight: 0.5, layers: [0], options: {momentum: 0.9, covariance: full}}]"
)
"""Targets with state beside the first: a codebook that grows at every step, and running moments."""


Changes = Sequence[tuple[str, str]]
"""Further arguments of the program."""
TOGETHER: Changes = (
    ("--recipe", str(Path(__file__).with_name("joint.yaml"))),
    ("--data.mixing", "together"),
    ("--accumulation", "3"),
    ("--model.backbone.width", "48"),
    ("--model.backbone.ffn", "96"),
    ("--model.predictor.width", "48"),
    ("--evaluation.max_masked", "8"),
)
"""Every step reads three sources, each with targets that have a state."""


def arguments(run_dir: Path, stage: int, more: Changes) -> list[str]:
    changes = {
        "--objective.target": STATE,
        "--recipe": "demo_vision",
        "--run_dir": str(run_dir),
        "--deepspeed_config": str(ROOT / "ds_configs" / f"zero{max(1, stage)}.json"),
        "--parallel.pipeline": "1" if stage else "2",
        "--stop_at": str(STEPS),
        "--global_batch_size": "8",
        "--checkpoint.every": str(EVERY),
        "--teacher.placement": "cpu",
        "--evaluation.train": "null",
        "--tracking.enabled": "false",
        "--tracking.plot_every": "null",
        "--evaluation.test": "null",
        **dict(more),
    }
    return [text for pair in changes.items() for text in pair]


def start(run_dir: Path, stage: int, fault: str = "", more: Changes = ()) -> list[Rank]:
    given = arguments(run_dir, stage, more)
    return start_ranks(2, ROOT / "d2v_scale" / "train.py", *given, env={"D2V_FAULT": fault})


def finish(processes: list[Rank], timeout: float) -> list[int]:
    """Wait until all end, or one does and the others are killed as the launcher does. Exit codes."""
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if all(code is not None for code in codes) or any(code not in (None, 0) for code in codes):
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"the ranks hang: {[process.poll() for process in processes]}")
    finally:
        stop(processes)
    return [process.returncode for process in processes]


def latest(run_dir: Path) -> Checkpoint | None:
    return find_newest_valid(run_dir / "checkpoints")[0]


def train_to_the_end(run_dir: Path, stage: int, more: Changes = ()) -> None:
    codes = finish(start(run_dir, stage, more=more), 300)
    assert codes == [0, 0], (run_dir / "logs" / "rank-00000.log").read_text()[-2000:]


def kill_once(run_dir: Path, stage: int, strike: str | float, more: Changes = ()) -> str:
    """Start (or resume) the run and kill it: at a named point, or after some seconds of work. What happened."""
    before = latest(run_dir)
    first = before.step if before else 0
    if isinstance(strike, str):
        rank = int(strike.split(":")[1])
        codes = finish(start(run_dir, stage, strike, more), 120)
    else:
        processes = start(run_dir, stage, more=more)
        rank = random.randrange(2)
        wait_for_work(run_dir, processes, first)
        time.sleep(strike)
        processes[rank].send_signal(signal.SIGKILL)
        codes = finish(processes, 120)
    after = latest(run_dir)
    last = after.step if after else 0
    assert last >= first, "a kill lost a committed checkpoint"
    hit = codes[rank] == -signal.SIGKILL
    return f"{'killed' if hit else 'ended '} {strike!s:>16}  exit codes {codes}  checkpoint {first} -> {last}"


def wait_for_work(run_dir: Path, processes: list[Rank], first: int) -> None:
    """Until the run has made a new checkpoint's worth of progress, or ended."""
    deadline = time.monotonic() + 90
    seen = len(list((run_dir / "checkpoints").glob(".tmp-*")))
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        names = [path.name for path in (run_dir / "checkpoints").glob("*step-*")]
        if any(int(name.removeprefix(".tmp-").split("-")[1]) > first for name in names) or len(names) > seen + 3:
            return
        time.sleep(0.02)


def check_same(reference: Path, survivor: Path) -> None:
    """Final weights, moments, teacher and the targets' state bit by bit, and what the run computes in."""
    kept = arithmetic.read(reference)
    assert kept is not None
    assert arithmetic.read(survivor) == kept
    expected, found = latest(reference), latest(survivor)
    assert expected is not None
    assert found is not None
    assert expected.step == found.step == STEPS
    assert float(expected.tensor("state", "target.vision.codes.used").sum()) > 8
    assert set(found.kinds()) == set(expected.kinds()) == {"student", "exp_avg", "exp_avg_sq", "teacher", "state"}
    for kind in expected.kinds():
        for name in expected.names(kind):
            assert torch.equal(expected.tensor(kind, name), found.tensor(kind, name)), (kind, name)
    status = json.loads((survivor / "status.json").read_text())
    assert status["exit_code"] == 0


def strikes(kills: int, seed: int) -> list[str | float]:
    """Every point at least once, then other passages and ranks, and a quarter at random times."""
    chooser = random.Random(seed)
    passages = {
        point: [f"{point}:{rank}:{nth}" for rank in ((0,) if point in ONLY_RANK_0 else (0, 1)) for nth in times]
        for point, times in POINTS.items()
    }
    for choices in passages.values():
        chooser.shuffle(choices)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*passages.values()))
    chosen: list[str | float] = [strike for strike in turns if strike is not None][: kills * 3 // 4]
    return chosen + [chooser.uniform(0.0, 1.5) for _ in range(kills - len(chosen))]


def harness(folder: Path, stage: int, kills: list[str | float], more: Changes = ()) -> list[str]:
    """A run that is never killed and one that is killed again and again; both must end the same."""
    reference, survivor = folder / f"reference-z{stage}", folder / f"survivor-z{stage}"
    train_to_the_end(reference, stage, more)
    lines = []
    for number, strike in enumerate(kills):
        done = latest(survivor)
        if done is not None and done.step >= STEPS - 3:
            # Nothing left to kill: compare, and begin another run.
            train_to_the_end(survivor, stage, more)
            check_same(reference, survivor)
            survivor = folder / f"survivor-z{stage}-{number}"
        lines.append(f"ZeRO-{stage} {kill_once(survivor, stage, strike, more)}")
        print(lines[-1], flush=True)
    train_to_the_end(survivor, stage, more)
    check_same(reference, survivor)
    return lines


@pytest.mark.parametrize(("stage", "kills"), [(3, ["ema:1:4", "marker:0:1", "shard_write:1:3"])])
def test_killed_three_times_the_run_ends_the_same(tmp_path: Path, stage: int, kills: list[str | float]) -> None:
    begun = time.time()
    lines = harness(tmp_path, stage, kills)
    assert all("killed" in line for line in lines)
    check_account(tmp_path / f"survivor-z{stage}", begun, attempts=4)


def check_account(survivor: Path, begun: float, *, attempts: int) -> None:
    """Every second from its first process to its last word has a name; MLflow gets what the report shows."""
    found = read_account(survivor)
    lines = [json.loads(line) for line in (survivor / "timeline.jsonl").read_text().splitlines()]
    first, last = lines[0]["started"], lines[-1]["time"]
    assert begun < first
    assert (len(found), found[-1].code, found[-1].last) == (attempts, 0, STEPS)
    assert [one.code for one in found[:-1]] == [None] * (attempts - 1)
    assert [one.first for one in found] == sorted(one.first for one in found)
    assert sum(one.wall for one in found) == pytest.approx(last - first, rel=0.01)
    ended = json.loads((survivor / "status.json").read_text())["time"]
    assert ended == pytest.approx(last, abs=0.01 * (last - first) + 2.0)
    recorded = {name: value for record in read_records(survivor) for name, value in record.items()}
    told = sum(recorded[f"spent/{kind}"] for kind in KINDS)
    assert told == pytest.approx(last - first, abs=0.01 * (last - first) + 2.0)


@pytest.mark.slow
def test_killed_in_a_pipeline_the_run_ends_the_same(tmp_path: Path) -> None:
    lines = harness(tmp_path, 0, ["ema:1:4", "marker:0:1", "shard_write:1:3"])
    assert all("killed" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_killed_while_all_sources_are_read_together_the_run_ends_the_same(tmp_path: Path, stage: int) -> None:
    demo.ensure(f"demo_data/{modality}/train.index.json" for modality in ("vision", "speech", "text"))
    lines = harness(tmp_path, stage, ["ema:1:4", "marker:0:1", "backward:1:4"], TOGETHER)
    assert all("killed" in line for line in lines)


@pytest.mark.slow
def test_killed_while_samples_are_paired_the_run_ends_the_same(tmp_path: Path) -> None:
    """Samples of several parts, of which some lack one and others have one hidden."""
    recipe = write_recipe(tmp_path / "pairs.yaml", write_pairs(tmp_path / "shards", paired_samples(60)))
    pairs = (("--recipe", str(recipe)), ("--optim.max_steps", str(STEPS)))
    lines = harness(tmp_path, 3, ["ema:1:4", "marker:0:1", "backward:1:3"], pairs)
    assert all("killed" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_killed_while_muon_steps_the_matrices_the_run_ends_the_same(tmp_path: Path, stage: int) -> None:
    """At ZeRO-1 and 3 ranks hold pieces of matrices, which a step gathers; of its moments there is one."""
    lines = harness(
        tmp_path, stage, ["optimizer:1:2", "marker:0:1", "backward:1:3"], (("--optim.muon.momentum", "0.9"),)
    )
    assert all("killed" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_killed_twenty_times_the_run_ends_the_same(tmp_path: Path, stage: int) -> None:
    lines = harness(tmp_path, stage, strikes(20, seed=stage))
    assert sum("killed" in line for line in lines) >= 18


if __name__ == "__main__":
    import tempfile

    total = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    with tempfile.TemporaryDirectory() as temporary:
        results = [
            line for stage in (1, 3) for line in harness(Path(temporary), stage, strikes(total // 2, seed=stage))
        ]
    struck = sum("killed" in line for line in results)
    print(f"{struck} kills of {len(results)} attempts; every run ended bitwise as one never killed")
