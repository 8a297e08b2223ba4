"""Encoders in the shape of others' benchmarks: the pages' code, against the packages where they are installed."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import papers
import pytest
import torch
from exported_models import checkpoint_of
from PIL import Image

import d2v_scale
from d2v_scale.api import host_encoders
from d2v_scale.errors import DataError
from d2v_scale.model.parallel_linear import undivided

SPEECH, IMAGES = ((papers.ROOT / "docs" / f"{name}.md").read_text() for name in ("speech_benchmarks", "image_features"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `runs/speech` and `runs/vit` lie."""
    root = tmp_path_factory.mktemp("hosts")
    (root / "runs").mkdir()
    for name, model in (("speech", "v2_speech"), ("vit", "v1_vision")):
        with undivided():
            checkpoint_of(model, root / name).rename(root / "runs" / name)
    return root


@pytest.fixture
def code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a block of a page, and gives its names."""
    monkeypatch.chdir(folder)

    def run(text: str, number: int, **names: Any) -> dict[str, Any]:
        block = papers.blocks(text, "python")[number]
        exec(compile(block, "page", "exec"), names)
        return names

    return run


def test_frames_of_speech_are_those_of_the_encoder(code: Any) -> None:
    encoder = code(SPEECH, 0)["SpeechEncoder"]()
    ours = d2v_scale.load_encoder("runs/speech")
    wave = 0.1 * torch.randn(8000)
    expected = ours.layers([wave.numpy()], [-1])[0][0]
    torch.testing.assert_close(encoder(wave)[0], expected, rtol=1e-4, atol=1e-5)
    batch = encoder(torch.stack([wave, wave.flip(0)]))
    assert batch.shape == (2, *expected.shape)
    assert (batch.dtype, encoder.output_dim, encoder.sampling_rate) == (torch.float32, 32, 16000)
    assert abs(encoder.hop_size_in_ms * len(expected) - 500) < 3 * encoder.hop_size_in_ms
    encoder.train()
    assert torch.equal(encoder(wave)[0], batch[0]) or torch.allclose(encoder(wave)[0], batch[0], atol=1e-5)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_waves_that_are_none_are_refused(code: Any) -> None:
    encoder = code(SPEECH, 0)["SpeechEncoder"]()
    for wave, said in ((torch.zeros(3), "Wave 0 has the shape"), (torch.full((8000,), torch.nan), "not finite")):
        with pytest.raises(DataError, match=said):
            encoder(wave)


def test_an_upstream_has_all_layers_of_waves_of_any_lengths(code: Any) -> None:
    upstream = host_encoders.S3prlUpstream("runs/speech")
    waves = [0.1 * torch.randn(n) for n in (8000, 5000)]
    found = upstream(waves)
    states = d2v_scale.load_encoder("runs/speech").layers([wave.numpy() for wave in waves])
    assert len(found["hidden_states"]) == upstream.depth == len(states[0])
    for layer, hidden in enumerate(found["hidden_states"]):
        for row, own in zip(hidden, states, strict=True):
            torch.testing.assert_close(row[: own.shape[1]], own[layer], rtol=1e-4, atol=1e-5)
    assert torch.equal(found["last_hidden_state"], found["hidden_states"][-1])
    rate = upstream.get_downsample_rates("hidden_states")
    assert abs(found["last_hidden_state"].shape[1] - 8000 / rate) < 3


def test_images_have_the_features_of_the_encoder(code: Any) -> None:
    model = code(IMAGES, 0)["model"]
    channels, height, width = model.pretrained_cfg["input_size"]
    picture = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    cfg = model.pretrained_cfg
    x = (torch.from_numpy(picture) / 255 - torch.tensor(cfg["mean"])) / torch.tensor(cfg["std"])
    ours = d2v_scale.load_encoder("runs/vit")
    ours.recipe.data.vision.evaluation_crop = 1.0
    torch.testing.assert_close(model(x.permute(2, 0, 1)[None]), ours.embed([picture]), rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="Images have the shape"):
        model(torch.zeros(1, channels, height + 1, width))


def test_an_encoder_without_such_a_stem_is_refused(code: Any) -> None:
    with pytest.raises(DataError, match="one stem of recordings is needed"):
        host_encoders.SpeechFrames("runs/vit")
    with pytest.raises(DataError, match="no such stem 'x'"):
        host_encoders.ImageFeatures("runs/vit", stem="x")


def _installed(package: str) -> Any:
    return pytest.mark.skipif(
        importlib.util.find_spec(package) is None, reason=f"{package} is not installed: it is no dependency"
    )


@_installed("xares")
def test_x_ares_accepts_the_page_s_encoder(code: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xares.audio_encoder_checker import check_audio_encoder  # type: ignore[import-not-found]
    from xares.utils import attr_from_py_path  # type: ignore[import-not-found]

    (folder / "speech_encoder.py").write_text(papers.blocks(SPEECH, "python")[0])
    monkeypatch.syspath_prepend(str(folder))
    assert check_audio_encoder(attr_from_py_path("speech_encoder.py", endswith="Encoder")())
    sys.modules.pop("speech_encoder")


@_installed("s3prl")
def test_s3prl_finds_and_runs_the_page_s_upstream(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchaudio  # type: ignore[import-untyped]

    # s3prl 0.4 calls what torchaudio has no longer; neither has to do with our upstream.
    monkeypatch.setattr(torchaudio, "set_audio_backend", lambda _: None, raising=False)
    try:
        from s3prl.nn import Featurizer, S3PRLUpstream  # type: ignore[import-not-found]
    except Exception as error:  # whatever it needs and does not require
        pytest.skip(f"s3prl cannot be imported here: {type(error).__name__}: {error}")
    code(SPEECH, 1, __name__="superb")
    upstream = S3PRLUpstream("d2v_scale_local", path_or_url="runs/speech")
    states, lengths = upstream(torch.randn(2, 16000), torch.tensor([16000, 9000]))
    assert upstream.hidden_sizes == [32] * upstream.num_layers
    assert len(states) == upstream.num_layers
    features, _ = Featurizer(upstream)(states, lengths)
    assert features.shape == states[0].shape


@_installed("timm")
def test_timm_makes_its_transform_of_the_model(code: Any) -> None:
    pytest.importorskip("torchvision", reason="timm's transforms are torchvision's")
    model = code(IMAGES, 0)["model"]
    transform = code(IMAGES, 1, model=model)["transform"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    assert model(transform(picture)[None]).shape == (1, model.num_features)
