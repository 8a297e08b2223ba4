"""What Muon steps has one moment, in a run and in its checkpoints; those of earlier versions held zeros beside it."""

from pathlib import Path

import pytest
import torch

from d2v_scale.benchmarks import cases
from d2v_scale.benchmarks.sides import Ours
from d2v_scale.checkpoint import Checkpoint, training
from d2v_scale.checkpoint.commit import commit, write_tensors
from d2v_scale.checkpoint.format import Manifest, Piece, describe, first_only, merge
from d2v_scale.errors import CheckpointError
from d2v_scale.parallel import groups

TINY = ("--model.backbone.width=32", "--model.backbone.heads=4", "--model.backbone.ffn=64")
TINY += ("--model.backbone.depth=4", "--model.predictor.width=32", "--model.vision.image_size=64")
MATRIX, VECTOR = "blocks.0.ffn.fc1.weight", "blocks.0.norm1.weight"


def written(root: Path, found: list[Piece], state: dict[str, object]) -> Checkpoint:
    temporary = root / "tmp"
    temporary.mkdir(parents=True)
    tensors = {f"{piece.kind}/{piece.name}": piece.values.clone() for piece in found}
    files = [write_tensors(temporary / "rank-00000.safetensors", tensors)]
    layout = merge([describe(found)], moments=True, first_only=first_only(found))
    return Checkpoint.open(commit(temporary, root, Manifest(1, files, layout, state, {})))


@pytest.mark.usefixtures("world_of_one")
def test_a_run_goes_on_from_one_moment_and_from_the_zeros_of_earlier_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = groups.single_process()
    muon, plain = (cases.case("v2_vision", 2, None, (*TINY, *more)) for more in (("--optim.muon.momentum=0.9",), ()))
    ours = Ours(muon, topology)
    ours.step(muon.batch(), 0)
    found = training.pieces(ours.student, ours.teacher)
    state = training.state(ours.student, ours.teacher)
    new = written(tmp_path / "new", found, state)
    assert MATRIX not in new.names("exp_avg_sq")
    assert VECTOR in new.names("exp_avg_sq")
    zeros = [
        Piece("exp_avg_sq", piece.name, piece.shape, piece.slice, piece.start, torch.zeros_like(piece.values))
        for piece in found
        if piece.kind == "exp_avg" and piece.name not in new.names("exp_avg_sq")
    ]
    old = written(tmp_path / "old", found + zeros, state)
    assert set(old.names("exp_avg_sq")) == set(old.names("student"))
    before = {(piece.kind, piece.name): piece.values.clone() for piece in found}
    for checkpoint in (new, old):
        ours.step(muon.batch(1), 1)
        training.restore(checkpoint, ours.student, ours.teacher)
        after = {(piece.kind, piece.name): piece.values for piece in training.pieces(ours.student, ours.teacher)}
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], values) for key, values in before.items())
    # At ZeRO-1 a matrix may be on another rank altogether.
    elsewhere = [shard for shard in ours.student.shards() if shard.name != MATRIX]
    monkeypatch.setattr(ours.student, "shards", lambda: elsewhere)
    training.restore(new, ours.student, ours.teacher)
    ours.close()
    other = Ours(plain, topology)
    with pytest.raises(CheckpointError, match="with Muon"):
        training.restore(new, other.student, other.teacher)
    other.close()
