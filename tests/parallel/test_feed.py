"""Batches of one reader on every rank that shares a copy of the model."""

from pathlib import Path

from launch import run_ranks

WORKER = """
import torch
import torch.distributed as dist
import tiny_models
from d2v_scale.errors import DataStarved
from d2v_scale.parallel import groups
from d2v_scale.parallel.feed import SharedFeed, _tensors

topology = groups.initialize(groups.ParallelConfig(tensor=2))


def steps():
    if dist.get_rank(topology.model_group) != 0:
        raise AssertionError("only the first rank reads")
    for name in ("v1_text", "v2_vision", "v2_speech"):
        # Other numbers on every replica.
        yield [tiny_models.batch(name, clones=1 if name == "v1_text" else 2, padded=True, seed=topology.rank)]
    raise DataStarved("no more")


feed = SharedFeed(steps(), topology)
for name in ("v1_text", "v2_vision", "v2_speech"):
    (batch,) = next(feed)
    clones = 1 if name == "v1_text" else 2
    wanted = tiny_models.batch(name, clones=clones, padded=True, seed=topology.data_parallel_rank * 2)
    ours, expected = _tensors(batch), _tensors(wanted)
    assert ours.keys() == expected.keys(), (ours.keys(), expected.keys())
    assert all(torch.equal(ours[key], expected[key]) for key in expected), name
    assert (batch.modality, batch.keys, batch.clones) == (wanted.modality, wanted.keys, wanted.clones)
try:
    next(feed)
except DataStarved as error:
    print("starved:", error)
groups.shutdown()
"""


def test_one_rank_reads_and_all_get_the_batch_or_the_error(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    tests = Path(__file__).parents[1]
    script.write_text(f"import sys\nsys.path.insert(0, {str(tests)!r})\n{WORKER}")
    outputs = run_ranks(4, script)
    assert len(outputs) == 4
    assert all("starved: no more" in output for output in outputs), outputs
