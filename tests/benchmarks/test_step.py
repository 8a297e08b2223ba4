"""The peers compute the same step as the project, and the benchmark prints a ratio."""

import sys
from pathlib import Path

import pytest
import torch

from d2v_scale.benchmarks import cases, step
from d2v_scale.benchmarks.huggingface_peer import HuggingFacePeer
from d2v_scale.benchmarks.sides import Naive, Ours
from d2v_scale.errors import UserError
from d2v_scale.parallel import groups

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

TINY = ("--model.backbone.width=32", "--model.backbone.heads=4", "--model.backbone.ffn=64")
TINY_DECODER = ("--model.predictor.width=32",)
SHORT = {"v1_speech": 8000, "v2_speech": 8000, "v1_text": 32, "v2_text": 32}


def tiny(name: str) -> cases.Case:
    options = (*TINY, *(TINY_DECODER if name.startswith("v2") else ()))
    if "text" in name:
        options += ("--model.text.vocab_size=99", "--model.text.mask_id=98")
    return cases.case(name, 2, SHORT.get(name), options)


@pytest.mark.usefixtures("world_of_one")
@pytest.mark.parametrize("name", cases.NAMES)
def test_peers_agree_with_the_project_before_and_after_a_step(name: str) -> None:
    case, topology = tiny(name), groups.single_process()
    ours = Ours(case, topology)
    peers = {
        "peer": HuggingFacePeer(case, topology.device),
        "onednn": HuggingFacePeer(case, topology.device, onednn=True),
        "naive": Naive(case, topology.device),
    }
    step.check_losses(case, {"ours": ours, **peers}, case.batch(), exact=True)
    with torch.random.fork_rng():
        for side in (ours, *peers.values()):
            side.step(case.batch(), 1)
    ours.close()


def test_batches_of_the_cases_have_the_published_lengths() -> None:
    speech, text = cases.case("v2_speech"), cases.case("v1_text")
    assert speech.batch().masked_rt.shape == (4 * 8, 249)
    assert speech.recipe.model.speech is not None
    assert speech.recipe.model.speech.frames_of(speech.length) == 249
    assert text.batch().masked_rt.shape == (8, 256)
    assert cases.case("v2_vision").batch().masked_rt.shape == (8 * 16, 196)


def test_a_recipe_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="v3"):
        cases.case("v3_smell")


@pytest.mark.usefixtures("world_of_one")
def test_row_ends_in_its_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    import bench

    sizes = [*TINY, "--model.backbone.depth=3", "--model.vision.image_size=64", "--threads=1"]
    sizes += ["--objective.masking.target_count=8", "--objective.masking.min_block=4"]
    sizes += ["--peer_products=onednn"]
    assert bench.main(["step", "--recipe=v1_vision", "--samples=2", "--rounds=2", "--warmup=1", *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    # Of 2 rows of 17 positions.
    [stands_on] = [line for line in lines if "GFLOP/s" in line]
    assert "at 34 x 32 x 64: F.linear" in stands_on
    assert "bare" in stands_on
    last = lines[-1]
    assert last.startswith("v1_vision")
    assert "against hf through oneDNN" in last
    assert last.endswith("x")
    assert float(last.split()[-1][:-1]) > 0


@pytest.mark.usefixtures("world_of_one")
def test_a_step_with_muon_is_measured_beside_the_same_step_with_adamw(capsys: pytest.CaptureFixture[str]) -> None:
    import bench

    command = ["step", "--recipe=v2_vision", "--peer=adamw", "--samples=2", "--rounds=1", "--warmup=1", "--threads=1"]
    command += [*TINY, *TINY_DECODER, "--model.vision.image_size=64"]
    assert bench.main([*command, "--optim.muon.momentum=0.95"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "step against adamw" in last
    assert float(last.split()[-1][:-1]) > 0
    assert bench.main(command) == 2


@pytest.mark.usefixtures("world_of_one")
def test_linears_of_a_peer_multiply_through_onednn_where_it_is_asked_to() -> None:
    case, device = tiny("v1_vision"), groups.single_process().device
    batch, counts = case.batch(), {}
    for onednn in (False, True):
        peer = HuggingFacePeer(case, device, onednn=onednn)
        with torch.profiler.profile() as profile:
            peer.step(batch, 0)
        counts[onednn] = {one.key: one.count for one in profile.key_averages()}
    assert counts[True].get("mkldnn::_linear_pointwise", 0) > 0
    assert counts[False].get("mkldnn::_linear_pointwise", 0) == 0
    assert counts[True].get("aten::addmm", 0) < counts[False]["aten::addmm"]
