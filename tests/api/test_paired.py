"""Encoders that were trained on paired samples: any subset of parts, and exports of their stems."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from paired_shards import paired_samples, write_pairs, write_recipe

import d2v_scale
from d2v_scale.commands import export
from d2v_scale.errors import DataError

WAVE = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
IMAGE = np.random.default_rng(1).integers(0, 255, (16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps on paired samples, at a rate at which the vectors of stems move far from zero."""
    root = tmp_path_factory.mktemp("paired")
    index = write_pairs(root / "shards", paired_samples(20))
    recipe = write_recipe(root / "pairs.yaml", index, **{"lr: 1.0e-3": "lr: 0.1"})
    command = [sys.executable, "-m", "d2v_scale.train", "--recipe", str(recipe), "--run_dir", str(root / "run")]
    done = subprocess.run([*command, "--stop_at", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return root / "run"


def test_an_encoder_of_pairs_embeds_any_subset_of_parts(run: Path) -> None:
    encoder = d2v_scale.load_encoder(run)
    images, waves, texts = [IMAGE, IMAGE[::-1].copy()], [WAVE, WAVE], ["the quick fox", "a lazy dog"]
    whole = encoder.embed({"vision": images, "speech": waves, "text": texts})
    assert whole.shape == (2, 32)
    assert not torch.equal(whole[0], whole[1])
    two = encoder.embed({"text": texts, "vision": images})
    lacking = encoder.embed({"vision": images, "speech": [None, None], "text": texts})
    torch.testing.assert_close(two, lacking, rtol=1e-4, atol=1e-5)
    alone = encoder.embed({"vision": images})
    torch.testing.assert_close(alone, encoder.embed(images, stem="vision"), rtol=1e-5, atol=1e-6)
    mixed = encoder.embed({"vision": [None, images[1]], "text": [texts[0], None]})
    torch.testing.assert_close(mixed[1], alone[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], encoder.embed({"text": texts[:1]})[0], rtol=1e-4, atol=1e-5)


def test_parts_that_are_longer_than_what_is_read_were_cut_without_a_word(run: Path) -> None:
    encoder = d2v_scale.load_encoder(run)
    texts = ["the quick fox", "a lazy dog jumps " * 30, None]
    with pytest.warns(UserWarning, match=r"1 of 2 samples are longer .* \(31 tokens\)") as warned:
        encoder.embed({"vision": [IMAGE] * 3, "text": texts})
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ({"smell": [IMAGE]}, "samples names smell"),
        ({}, "samples names no stem"),
        ({"vision": [IMAGE], "text": ["a", "b"]}, "1 of vision, 2 of text"),
        ({"vision": []}, "0 of vision"),
        ({"vision": [None]}, "Sample 0 has no part"),
    ],
)
def test_what_is_no_paired_sample_is_said(run: Path, samples: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        d2v_scale.load_encoder(run).embed(samples)


def test_exported_stems_compute_what_they_do_among_others(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vector that tells the stem apart is in a bias of the export; all stems at once need our own format."""
    encoder = d2v_scale.load_encoder(run)
    for stem, samples in {"vision": [IMAGE], "speech": [WAVE], "text": [np.arange(4, 12)]}.items():
        assert export.main([str(run), str(tmp_path / stem), "--to", "hf", "--modality", stem]) == 0, capsys.readouterr()
        again = d2v_scale.load_encoder(tmp_path / stem)
        assert not [name for name, _ in again._frozen.model.named_parameters() if name.endswith("features.modality")]
        torch.testing.assert_close(again.embed(samples), encoder.embed(samples, stem=stem), rtol=1e-4, atol=1e-5)
    vector = encoder._frozen.model.stems["vision"].features.modality
    assert float(vector.abs().max()) > 1e-4, "nothing was folded"
    assert export.main([str(run), str(tmp_path / "all"), "--to", "hf", "--modality", "vision+text"]) == 2
    assert "safetensors" in capsys.readouterr().err
    assert export.main([str(run), str(tmp_path / "all"), "--to", "safetensors"]) == 0
    both = {"vision": [IMAGE], "text": ["the fox"]}
    torch.testing.assert_close(d2v_scale.load_encoder(tmp_path / "all").embed(both), encoder.embed(both))
