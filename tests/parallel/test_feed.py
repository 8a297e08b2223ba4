"""Batches of one reader on every rank that shares a copy of the model."""

from pathlib import Path

from launch import run_ranks

WORKER = """
import torch
import torch.distributed as dist
import tiny_models
from megatron.core import parallel_state
from d2v_scale.errors import DataStarved
from d2v_scale.parallel import groups
from d2v_scale.parallel.feed import SharedFeed, _tensors

NAMES = ("v1_text", "v2_vision", "v2_speech")


def seed_of(topology):
    # Other numbers on every replica.
    return dist.get_process_group_ranks(topology.model_group)[0]


def batch_of(name, seed):
    return tiny_models.batch(name, clones=1 if name == "v1_text" else 2, padded=True, seed=seed)


def steps(topology):
    if dist.get_rank(topology.model_group) != 0:
        raise AssertionError("only the first rank reads")
    for name in NAMES:
        yield [batch_of(name, topology.rank)]
    raise DataStarved("no more")


def feed_all(feed, topology):
    for name in NAMES:
        (batch,) = next(feed)
        wanted = batch_of(name, seed_of(topology))
        ours, expected = _tensors(batch), _tensors(wanted)
        assert ours.keys() == expected.keys(), (ours.keys(), expected.keys())
        assert all(torch.equal(ours[key], expected[key]) for key in expected), name
        assert (batch.modality, batch.keys, batch.clones) == (wanted.modality, wanted.keys, wanted.clones)
    try:
        next(feed)
    except DataStarved as error:
        print("starved:", error)


def watched(function, seen):
    def call(*args, group, **options):
        seen.add(group)
        return function(*args, group=group, **options)

    return call


topology = groups.initialize(groups.ParallelConfig(tensor=2))
feed_all(SharedFeed(steps(topology), topology), topology)

# As with NCCL: objects over host memory, tensors over the model's own group. Its ranks are not neighbours here.
parallel_state.destroy_model_parallel()
topology = groups._divide(groups.ParallelConfig(pipeline=2), topology.device)
get_backend, broadcast, broadcast_objects = dist.get_backend, dist.broadcast, dist.broadcast_object_list
dist.get_backend = lambda group: "nccl"
feed = SharedFeed(steps(topology), topology)
dist.get_backend = get_backend
tensors_over, objects_over = set(), set()
dist.broadcast = watched(broadcast, tensors_over)
dist.broadcast_object_list = watched(broadcast_objects, objects_over)
feed_all(feed, topology)
assert tensors_over == {topology.model_group}
assert topology.model_group not in objects_over
groups.shutdown()
"""


def test_one_rank_reads_and_all_get_the_batch_or_the_error(tmp_path: Path) -> None:
    """A GPU was waited for in every step: the description of the batches went through it."""
    script = tmp_path / "worker.py"
    tests = Path(__file__).parents[1]
    script.write_text(f"import sys\nsys.path.insert(0, {str(tests)!r})\n{WORKER}")
    outputs = run_ranks(4, script)
    assert len(outputs) == 4
    assert all(output.count("starved: no more") == 2 for output in outputs), outputs
