"""2.0 exports in transformers: new heads, pipelines, the trainer, saving, as with its own data2vec classes."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_models import MODELS, REMOTE, SAMPLES, Folders, inputs, load

warnings.filterwarnings("ignore")

HEADS = [("speech", "AutoModelForCTC"), ("speech", "AutoModelForAudioClassification")]
HEADS += [("speech", "AutoModelForAudioFrameClassification"), ("vision", "AutoModelForImageClassification")]


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("kind", "auto"), HEADS)
def test_a_new_head_on_an_encoder(version: str, kind: str, auto: str, folders: Folders, tmp_path: Path) -> None:
    folder = folders[f"{version}_{kind}"]
    options: dict[str, Any] = {"vocab_size": 9} if auto == "AutoModelForCTC" else {"num_labels": 5}
    model, encoder = load(auto, folder, **options), load("AutoModel", folder)
    with torch.no_grad():
        output = model(**inputs(kind), output_hidden_states=True)
        states = encoder(**inputs(kind), output_hidden_states=True).hidden_states
    assert output.logits.shape[-1] == next(iter(options.values()))
    assert torch.isfinite(output.logits).all()
    assert all(torch.equal(mine, other) for mine, other in zip(output.hidden_states, states, strict=True))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = load(auto, tmp_path)
    assert torch.allclose(again(**inputs(kind)).logits, output.logits, atol=1e-5)


def test_heads_that_are_not_there_are_refused(folders: Folders) -> None:
    for kind, auto in (("speech", "AutoModelForAudioXVector"), ("vision", "AutoModelForSemanticSegmentation")):
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            load(auto, folders[f"v2_{kind}"])


def test_labels_of_every_kind(folders: Folders) -> None:
    folder, given = folders["v2_vision_classes"], inputs("vision")
    several = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    model = load("AutoModelForImageClassification", folder, problem_type="multi_label_classification")
    output = model(**given, labels=several)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.logits, several)
    assert torch.equal(output.loss, expected)
    model.config.problem_type = None
    assert torch.equal(model(**given, labels=several).loss, expected)
    one = torch.tensor([2, 0])
    assert torch.equal(model(**given, labels=one).loss, torch.nn.functional.cross_entropy(output.logits, one))
    scores = load("AutoModelForImageClassification", folder, num_labels=1, ignore_mismatched_sizes=True)
    scores.config.problem_type = "regression"
    for target in (torch.tensor([0.5, 2.0]), torch.tensor([[0.5], [2.0]])):
        output = scores(**given, labels=target)
        assert torch.allclose(output.loss, (output.logits.flatten() - target.flatten()).square().mean())
    seven = load("AutoModelForImageClassification", folder, num_labels=7, ignore_mismatched_sizes=True)
    assert len(seven.config.id2label) == seven(**given).logits.shape[-1] == 7
    ctc = load("AutoModelForCTC", folders["v2_ctc"])
    with pytest.raises(ValueError, match="vocab_size"):
        ctc(**inputs("speech"), labels=torch.tensor([[5, 99], [5, 6]]))
    summed = ctc(**inputs("speech"), labels=torch.tensor([[5, 6, -100], [5, 6, 5]])).loss
    ctc.config.ctc_loss_reduction = "mean"
    assert ctc(**inputs("speech"), labels=torch.tensor([[5, 6, -100], [5, 6, 5]])).loss < summed


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_of_padding_alone_is_finite_and_harms_no_other(attention: str, folders: Folders) -> None:
    mask = torch.ones(3, SAMPLES, dtype=torch.long)
    mask[1], mask[2, 40:] = 0, 0
    given = inputs("speech", rows=3)
    for auto, folder in (("AutoModel", "speech"), ("AutoModelForAudioClassification", "speech_classes")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            model = load(auto, folders[f"v2_{folder}"], attn_implementation=attention, dtype=dtype).train()
            values = given["input_values"].to(dtype)
            output = model(values, attention_mask=mask)[0]
            assert torch.isfinite(output).all()
            output.float().sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in model.parameters())
            if dtype is torch.float32:
                assert torch.allclose(output[0], model(values[:1])[0][0], atol=1e-5)


def test_images_of_another_size(folders: Folders) -> None:
    model = load("AutoModel", folders["v2_vision"])
    with torch.no_grad():
        native = model(**inputs("vision")).last_hidden_state
        stretched = model(**inputs("vision"), interpolate_pos_encoding=True).last_hidden_state
        assert torch.allclose(native, stretched, atol=1e-6)
        image = torch.randn(1, 3, 32, 24)
        plain, laid = (model(image, interpolate_pos_encoding=flag).last_hidden_state for flag in (False, True))
    assert plain.shape == laid.shape == (1, 1 + 8 * 6, 32)
    assert not torch.allclose(plain, laid, atol=1e-3)


def test_arguments_that_mean_nothing_here_are_refused(folders: Folders) -> None:
    vision, speech = load("AutoModel", folders["v2_vision"]), load("AutoModel", folders["v2_speech"])
    with pytest.raises(ValueError, match="no mask token"):
        vision(**inputs("vision"), bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool))
    with pytest.raises(TypeError, match="attention_msk"):
        speech(**inputs("speech"), attention_msk=None)
    with pytest.raises(TypeError, match="pixel_values"):
        speech(**inputs("vision"))


def test_regularisation_of_fine_tuning_acts_while_training_alone(folders: Folders) -> None:
    options: list[dict[str, Any]] = [
        {"mask_time_prob": 0.5, "mask_time_length": 2},
        {"mask_feature_prob": 0.5, "mask_feature_length": 4},
        {"layerdrop": 0.9},
        {"drop_path_rate": 0.9},
        {"feat_proj_dropout": 0.5},
        {"attention_dropout": 0.5},
        {"activation_dropout": 0.5},
    ]
    given = inputs("speech")
    plain = load("AutoModel", folders["v2_speech"])(**given).last_hidden_state
    for option in options:
        torch.manual_seed(0)
        np.random.seed(0)
        model = load("AutoModel", folders["v2_speech"], **option)
        assert torch.equal(model(**given).last_hidden_state, plain), option
        model.train()
        assert not torch.allclose(model(**given).last_hidden_state, plain, atol=1e-3), option
        model.gradient_checkpointing_enable()
        model(**given).last_hidden_state.sum().backward()
    model = load("AutoModel", folders["v2_speech"])
    hidden = torch.zeros(2, 19, dtype=torch.bool)
    hidden[1, 3:6] = True
    masked = model(**given, mask_time_indices=hidden).last_hidden_state
    assert torch.equal(masked[0], plain[0])
    assert not torch.allclose(masked[1], plain[1], atol=1e-3)


def test_a_weighted_sum_of_layers(folders: Folders) -> None:
    for auto in ("AutoModelForAudioClassification", "AutoModelForAudioFrameClassification"):
        torch.manual_seed(0)
        model = load(auto, folders["v2_speech"], num_labels=3, use_weighted_layer_sum=True)
        assert torch.allclose(model.layer_weights, torch.full((4,), 0.25))
        output = model(**inputs("speech"))
        assert output.hidden_states is None
        output.logits.sum().backward()
        assert model.layer_weights.grad.abs().sum() > 0


def hears_the_sign(model: Any) -> Any:
    """Frames of positive samples are an a, others a b, whatever the encoder's weights are."""
    heard: list[torch.Tensor] = []

    def keep(_module: Any, positional: tuple, named: dict[str, torch.Tensor]) -> None:
        heard[:] = [named["input_values"]]

    def answer(_head: Any, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        ratio, frames = model.config.inputs_to_logits_ratio, logits.shape[1]
        positive = heard[0][:, : frames * ratio].reshape(len(logits), frames, ratio).mean(-1) > 0
        return torch.nn.functional.one_hot(torch.where(positive, 5, 6), logits.shape[-1]).float()

    model.register_forward_pre_hook(keep, with_kwargs=True)
    model.lm_head.register_forward_hook(answer)
    return model


def test_chunks_and_time_stamps_of_transcription(folders: Folders) -> None:
    """4 seconds that change every 0.2: as many letters, each at its time, whole and in chunks of a second."""
    from transformers import AutoFeatureExtractor, AutoTokenizer, pipeline

    wave = np.tile(np.repeat([1.0, -1.0], 3200), 10).astype(np.float32)
    for version in ("v1", "v2"):
        folder = folders[f"{version}_ctc"]
        listen = pipeline(
            "automatic-speech-recognition",
            model=hears_the_sign(load("AutoModelForCTC", folder)),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            feature_extractor=AutoFeatureExtractor.from_pretrained(folder),
        )
        for options in ({}, {"chunk_length_s": 1.0, "stride_length_s": 0.25}):
            answer = listen(wave.copy(), return_timestamps="char", **options)
            assert answer["text"] == "ab" * 10, (version, options)
            starts = [chunk["timestamp"][0] for chunk in answer["chunks"]]
            assert np.allclose(starts, np.arange(20) * 0.2, atol=0.05), (version, options)


def test_pipelines_of_classification_and_features(folders: Folders) -> None:
    from PIL import Image
    from transformers import pipeline

    pixels = (np.random.default_rng(0).random((40, 60, 3)) * 255).astype("uint8")
    wave = np.random.default_rng(0).normal(0, 1, 16000).astype(np.float32)
    named = pipeline("image-classification", model=str(folders["v2_vision_classes"]), **REMOTE)
    assert {answer["label"] for answer in named(Image.fromarray(pixels))} == {"ant", "bee", "cow"}
    features = pipeline("image-feature-extraction", model=str(folders["v2_vision"]), **REMOTE)
    assert np.array(features(Image.fromarray(pixels))).shape == (1, 17, 32)
    heard = pipeline("audio-classification", model=str(folders["v2_speech_classes"]), **REMOTE)
    assert len(heard([wave.copy(), wave[:9000].copy()], batch_size=2)) == 2


class Rows(torch.utils.data.Dataset):
    def __init__(self, kind: str, labels: list[Any]) -> None:
        self.kind, self.labels = kind, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        [(name, values)] = inputs(self.kind, len(self)).items()
        return {name: values[index], "labels": torch.tensor(self.labels[index]), "unused": 1}


def trained(model: Any, rows: Rows, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    from transformers import Trainer, TrainingArguments

    given: dict[str, Any] = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0} | options
    arguments = TrainingArguments(
        str(out), report_to=[], use_cpu=True, save_strategy="no", seed=0, disable_tqdm=True, **given
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    trainer.save_model(str(out))
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_trainer_accumulates_batches_as_one(folders: Folders, tmp_path: Path) -> None:
    """Mean losses: two batches of two give the step of one batch of four. And what it saves loads."""
    pytest.importorskip("accelerate")
    rows = Rows("vision", [0, 1, 2, 1])
    results = []
    for size, steps in ((4, 1), (2, 2)):
        model = load("AutoModelForImageClassification", folders["v2_vision_classes"])
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        results.append(trained(model, rows, tmp_path / str(size), **options))
    start = dict(load("AutoModelForImageClassification", folders["v2_vision_classes"]).named_parameters())
    assert any((results[0][name] - value).abs().max() > 1e-4 for name, value in start.items())
    for name, value in results[0].items():
        assert torch.allclose(results[1][name], value, atol=1e-5), name
    again = load("AutoModelForImageClassification", tmp_path / "4")
    assert torch.equal(again.classifier.weight, results[0]["classifier.weight"])


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True, "torch_compile": False}])
def test_the_trainer_fine_tunes_speech(options: dict[str, Any], folders: Folders, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = load("AutoModelForCTC", folders["v2_speech"], vocab_size=7, mask_time_prob=0.2, mask_time_length=2)
    before = model.lm_head.weight.detach().clone()
    trained(model, Rows("speech", [[5, 6], [5, 5], [6, 4], [4, 4]]), tmp_path, max_steps=2, **options)
    assert not torch.equal(model.lm_head.weight, before)


BARE = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCTC, AutoModelForImageClassification
given = torch.load(sys.argv[1])
for auto, folder, name in given["cases"]:
    model = globals()[auto].from_pretrained(folder, trust_remote_code=True, device_map="cpu").eval()
    with torch.no_grad():
        assert torch.allclose(model(given[name])[0], given[folder], atol=1e-5), folder
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).hidden_size == 32
assert not any(name.split(".")[0] == "d2v_scale" for name in sys.modules)
print("same")
"""


def test_what_is_saved_again_loads_with_nothing_but_transformers(folders: Folders, tmp_path: Path) -> None:
    """Another process, an empty module cache: exported folders of both modalities, and those that were saved again."""
    pytest.importorskip("accelerate")
    given: dict[str, Any] = {"cases": [], **inputs("speech"), **inputs("vision")}
    for which in ("speech", "ctc", "vision", "vision classes"):
        auto, folder, _ = MODELS[which]
        name = "pixel_values" if "vision" in which else "input_values"
        model = load(auto, folders[f"v2_{folder}"])
        saved = tmp_path / folder / "again"
        model.save_pretrained(saved, max_shard_size="20KB")
        files = {file.name for file in saved.iterdir()}
        assert {f"{part}_data2vec2.py" for part in ("configuration", "layers", "modeling")} <= files
        assert auto in json.loads((saved / "config.json").read_text())["auto_map"]
        for path in (folders[f"v2_{folder}"], saved):
            given["cases"].append((auto, str(path), name))
            given[str(path)] = model(given[name])[0].detach()
    torch.save(given, tmp_path / "given.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", BARE, str(tmp_path / "given.pt")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same" in done.stdout
