"""`d2v_scale.load_encoder`: features as the evaluation computes them, in any process, of what Python has."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import tiny_models
import torch
from PIL import Image

import d2v_scale
from d2v_scale import modalities
from d2v_scale.checkpoint import write_single
from d2v_scale.commands import export, extract, import_weights
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.errors import CheckpointError, UserError
from d2v_scale.files import file_sha256
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.parallel_linear import undivided
from d2v_scale.networks.stack import Student
from d2v_scale.recipe import Recipe, to_dict
from d2v_scale.shards.reading import SampleStore
from d2v_scale.shards.shard_set import find_shards

KINDS = ("vision", "speech", "text")


def checkpoint(path: Path, model: ModelConfig, data: DataConfig, tokenizer: Path | None = None) -> Path:
    """A run directory with random weights, those of the teacher unlike the student's."""
    torch.manual_seed(0)
    recipe = Recipe(name="tiny", model=model, data=data)
    with undivided():
        shapes = {n: p.shape for n, p in Student(model).named_parameters()}
    student = {n: 0.3 * torch.randn(shape) + n.endswith("norm1.weight") for n, shape in shapes.items()}
    parts = recipe.parts()
    teacher = {n: t + 0.1 * torch.randn_like(t) for n, t in student.items() if parts.role(n) != "absent"}
    extra: dict[str, Any] = {"recipe": json.loads(json.dumps(to_dict(recipe)))}
    if tokenizer is not None:
        extra["tokenizer_sha256"] = file_sha256(tokenizer)
    write_single(path / "checkpoints", student, teacher, extra, step=7)
    return path


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, images: Path, sounds: Path, texts: Path) -> dict[str, Path]:
    """A run for each kind of stem, and `joint`."""
    root = tmp_path_factory.mktemp("runs")
    text = tiny_models.model("v2_text")
    assert text.text is not None
    text.text = dataclasses.replace(text.text, vocab_size=331, mask_id=330)
    models = {"vision": tiny_models.model("v1_vision"), "speech": tiny_models.model("v2_speech"), "text": text}
    shards = {"vision": images, "speech": sounds, "text": texts}
    made = {}
    for kind in KINDS:
        data = DataConfig(sources=[SourceConfig(shards=str(shards[kind] / "train-*.tar"), modality=kind)])
        tokenizer = texts / "tokenizer.model" if kind == "text" else None
        made[kind] = checkpoint(root / kind, models[kind], data, tokenizer)
    joint = dataclasses.replace(models["speech"], vision=tiny_models.vision("sincos"))
    return made | {"joint": checkpoint(root / "joint", joint, DataConfig())}


@pytest.fixture(scope="session")
def shards(images: Path, sounds: Path, texts: Path) -> dict[str, str]:
    return {k: str(d / "train-*.tar") for k, d in zip(KINDS, (images, sounds, texts), strict=True)}


def samples_of(pattern: str, shard: int) -> list[Any]:
    """The samples of a shard as a user has them: bytes of files, or str."""
    store, found = SampleStore(find_shards(SourceConfig(shards=pattern))), []
    for number in range(len(store.members(shard))):
        members = store.read(shard, number).members()
        [(extension, content)] = [pair for pair in members.items() if pair[0] != "cls"]
        found.append(content.decode() if extension == "txt" else content)
    return found


@pytest.mark.filterwarnings("ignore:.*longer than the encoder reads")
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_those_that_d2v_extract_writes(
    kind: str, runs: dict[str, Path], shards: dict[str, str], tmp_path: Path
) -> None:
    encoder = d2v_scale.load_encoder(runs[kind])
    assert (encoder.stems, encoder.step, encoder.width) == ([kind], 7, 32)
    assert extract.main([str(runs[kind]), shards[kind], str(tmp_path / "out"), "--layers", "0", "2"]) == 0
    written = [pyarrow.parquet.read_table(path)["features"] for path in sorted((tmp_path / "out").glob("*.parquet"))]
    given = [samples_of(shards[kind], shard) for shard in range(len(written))]
    store, kind_of = (
        SampleStore(find_shards(SourceConfig(shards=shards[kind]))),
        modalities.of(encoder.recipe.model, kind),
    )
    longest = kind_of.longest_read(encoder.recipe.data)
    for shard, (features, one) in enumerate(zip(written, given, strict=True)):
        order = np.arange(len(one))
        if kind != "vision":
            order = np.argsort(-store.members(shard).length_n.clip(max=longest), kind="stable")
        vectors = encoder.embed([one[k] for k in order], layers=(0, 2))
        assert vectors.dtype == torch.float32
        expected = torch.tensor(features.to_pylist())[order]
        assert torch.equal(vectors, expected), "the same batches, by length, the same bits"
    if kind == "speech":
        return  # the padding of 2.0's batches reaches its positional convolutions
    every = encoder.embed((sample for one in given for sample in one), layers=(0, 2), batch_size=7)
    expected = torch.tensor([row for features in written for row in features.to_pylist()])
    torch.testing.assert_close(every, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_layers_are_each_samples_own(kind: str, runs: dict[str, Path], shards: dict[str, str]) -> None:
    encoder = d2v_scale.load_encoder(runs[kind])
    given = ["fox", "a lazy dog", "the fox", "over", "a"] if kind == "text" else samples_of(shards[kind], 0)[:5]
    states = encoder.layers(given)
    assert [x.shape[0] for x in states] == [encoder.depth] * 5
    assert kind == "vision" or len({x.shape[1] for x in states}) > 1, "each has its own length"
    for one, alone in zip(states, encoder.layers(given, batch_size=1), strict=True):
        assert one.shape == alone.shape
        assert kind == "speech" or torch.allclose(one, alone, rtol=1e-4, atol=1e-5), "padding changes nothing"
    last = torch.stack([x[-1].mean(dim=0) for x in states])
    torch.testing.assert_close(encoder.embed(given), last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.layers(given, [-1, 0])[1][0], states[1][-1])


def test_embedding_changes_nothing_in_the_process(
    runs: dict[str, Path], shards: dict[str, str], images: Path, tmp_path: Path
) -> None:
    """No process group, no variable, neither DeepSpeed nor megatron-core; of runs, checkpoints and exports."""
    picture = tmp_path / "a.png"
    picture.write_bytes(samples_of(shards["vision"], 0)[0])
    sound = tmp_path / "a.flac"
    sound.write_bytes(samples_of(shards["speech"], 0)[0])
    given: dict[str, list[str]] = {"vision": [str(picture)] * 2, "speech": [str(sound)], "text": ["a lazy dog", "fox"]}
    asked, expected = [], {}
    for kind in KINDS:
        for form in ("hf", "safetensors"):
            folder = tmp_path / f"{kind}-{form}"
            arguments = [str(runs[kind]), str(folder), "--to", form]
            assert export.main(arguments) == 0
            asked.append((str(folder), given[kind]))
        asked.append((str(next((runs[kind] / "checkpoints").glob("step-*"))), given[kind]))
        expected[kind] = d2v_scale.load_encoder(runs[kind]).embed(given[kind])
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    command = [
        sys.executable,
        str(Path(__file__).with_name("embedded.py")),
        tmp_path / "out.json",
        tmp_path / "asked.json",
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("DS_ACCELERATOR", "LOCAL_RANK", "RANK")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    for number, (path, _) in enumerate(asked):
        torch.testing.assert_close(torch.tensor(found[path]), expected[KINDS[number // 3]], rtol=1e-4, atol=1e-5)


def test_what_python_has_is_what_files_hold(runs: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    vision = d2v_scale.load_encoder(runs["vision"])
    forms: list[Any] = [tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()]
    forms += [Image.open(tmp_path / "a.png"), pixels, torch.from_numpy(pixels)]
    assert (vision.embed(forms) == vision.embed(forms[:1])).all()
    turned = Image.fromarray(pixels)
    turned.getexif()[274] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    assert vision.embed([tmp_path / "turned.png"]).equal(vision.embed([Image.open(tmp_path / "turned.png")]))

    wave = (rng.standard_normal(4000) * 3000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", wave, 8000)
    speech = d2v_scale.load_encoder(runs["speech"])
    read = soundfile.read(tmp_path / "a.wav")
    waves: list[Any] = [tmp_path / "a.wav", (wave, 8000), read, (read[0].astype(np.float32), 8000)]
    vectors = speech.embed(waves)
    torch.testing.assert_close(vectors, vectors[:1].expand(4, -1), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(speech.embed([wave]), vectors[:1]), "an array alone is at 16 kHz"

    text = d2v_scale.load_encoder(runs["text"])
    (tmp_path / "a.txt").write_text("the quick brown fox")
    assert text.embed(["the quick brown fox"]).equal(text.embed([tmp_path / "a.txt"]))


def test_what_is_longer_than_the_encoder_reads_is_named(runs: dict[str, Path]) -> None:
    text = d2v_scale.load_encoder(runs["text"])
    with pytest.warns(UserWarning, match=r"^1 of 2 samples are longer than the encoder reads \(\d+ tokens\)"):
        text.embed(["fox", "fox " * 1000])


def one_sentence(error: pytest.ExceptionInfo[UserError]) -> str:
    told = str(error.value)
    assert "\n" not in told
    assert len(told) < 400
    return told


@pytest.mark.parametrize(
    ("kind", "samples", "says"),
    [
        ("vision", [], "There are no samples"),
        ("vision", "a.png", "samples is of type str. Give a list"),
        ("vision", 3, "samples is of type int"),
        ("vision", ["a text"], "Sample 0 of the stem 'vision': 'a text' is no file"),
        ("vision", ["x" * 5000], "cannot be read|no file"),
        ("vision", [Path(__file__)], r"Sample 0 \(test_encoder.py\) .*is no image"),
        ("vision", [np.zeros((3, 8, 8), np.float32)], r"is of type ndarray, float32 \(3, 8, 8\); taken are images"),
        ("vision", [Image.new("F", (8, 8))], "mode F"),
        ("vision", [np.zeros((0, 8, 3), np.uint8)], "no pixels"),
        ("vision", [None], "NoneType; taken are images"),
        ("speech", [np.zeros(16000, np.int64)], "ndarray, int64"),
        ("speech", [np.zeros((2, 16000), np.float32)], "Mix channels to one"),
        ("speech", [np.full(16000, np.nan, np.float32)], "not finite"),
        ("speech", [np.zeros(10, np.float32)], "less than one frame"),
        ("speech", [np.zeros(0, np.float32)], "no samples"),
        ("speech", [(np.zeros(16000, np.float32), 8.5)], "rate 8.5"),
        ("speech", [(np.zeros(16000, np.float32), 0)], "no rate of sound"),
        ("speech", [np.zeros((8, 8, 3), np.uint8)], "taken are recordings"),
        ("text", [""], "is empty"),
        ("text", ["\ud800"], "surrogate"),
        ("text", [np.array([5, 900])], "holds the id 900"),
        ("text", [Image.new("RGB", (8, 8))], "is of type Image; taken are texts"),
        ("joint", [], "has several stems. Give stem= one of 'vision' .images., 'speech' .recordings."),
    ],
)
def test_input_that_no_stem_reads_is_named_in_a_sentence(
    kind: str, samples: Any, says: str, runs: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=says) as error:
        d2v_scale.load_encoder(runs[kind]).embed(samples)
    one_sentence(error)


def test_one_of_several_stems_is_chosen_by_name(runs: dict[str, Path]) -> None:
    encoder = d2v_scale.load_encoder(runs["joint"])
    pixels = np.zeros((8, 8, 3), np.uint8)
    assert encoder.embed([pixels], stem="vision").shape == (1, 32)
    for call in ({"stem": "text"}, {"stem": "vision", "layers": [9]}, {"stem": "vision", "layers": []}):
        with pytest.raises(UserError, match=r"text|layers"):
            encoder.embed([pixels], **call)


def test_a_tokenizer_that_is_not_the_encoders_is_refused(runs: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes((texts / "tokenizer.model").read_bytes() + b"\n")
    with pytest.raises(UserError, match="another tokenizer"):
        d2v_scale.load_encoder(runs["text"], tokenizer=other).embed(["fox"])


def test_what_is_no_encoder_is_refused_in_a_sentence(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.pt").write_bytes(b"x")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "hologram"}')
    for name, says in {
        "empty": "holds no checkpoint",
        "file.pt": "d2v import",
        "gone": "not exist",
        "hf": "holds no model.safetensors",
    }.items():
        with pytest.raises(CheckpointError, match=says) as error:
            d2v_scale.load_encoder(tmp_path / name)
        assert name in one_sentence(error)
    with pytest.raises(CheckpointError, match="weights is 'mine'"):
        d2v_scale.load_encoder(runs["vision"], weights="mine")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="device 'gpu' cannot be used") as error:
        d2v_scale.load_encoder(runs["vision"], device="gpu")
    one_sentence(error)


def test_an_encoder_of_a_newer_version_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    """Its recipe has keys, or its model a stem, that this version does not know."""
    recipe = Recipe(name="tiny", model=tiny_models.model("v2_vision"))
    values = json.loads(json.dumps(to_dict(recipe)))
    values["model"]["hologram"] = {"side": 4}
    write_single(tmp_path / "run" / "checkpoints", {"a": torch.zeros(1)}, None, {"recipe": values}, step=1)
    assert export.main([str(runs["vision"]), str(tmp_path / "out"), "--to", "safetensors"]) == 0
    note = json.loads((tmp_path / "out" / "d2v_scale.json").read_text())
    note["recipe"]["model"]["hologram"] = {"side": 4}
    (tmp_path / "out" / "d2v_scale.json").write_text(json.dumps(note))
    for name in ("run", "out"):
        with pytest.raises(CheckpointError, match=r"hologram.*newer version") as error:
            d2v_scale.load_encoder(tmp_path / name)
        one_sentence(error)


def test_bytes_are_decoded_whatever_they_are_called() -> None:
    from d2v_scale.api.given import members_of

    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    assert list(members_of("array", buffer.getvalue())) == ["npz"]
    assert list(members_of("array", np.zeros((2, 3)))) == ["npy"]


def test_an_array_of_objects_is_refused_as_one() -> None:
    from d2v_scale.api.given import members_of

    with pytest.raises(ValueError, match="holds values of type object, which are no numbers: nothing is pickled"):
        members_of("array", np.array([[1, None]]))


@pytest.mark.parametrize("content", ["image", "recording", "text", "array"])
def test_what_a_mask_hides_is_not_read_as_data(content: Any) -> None:
    from d2v_scale.api.given import members_of

    hidden = np.ma.masked_array(np.ones(4, dtype=np.float32), mask=[0, 1, 0, 0])
    given = (hidden, 16000) if content == "recording" else hidden
    with pytest.raises(ValueError, match="masked array: fill it"):
        members_of(content, given)


def test_imported_weights_and_folders_of_others_are_encoders(runs: dict[str, Path], tmp_path: Path) -> None:
    """A Hugging Face folder without our note of its origin, and the checkpoint that `d2v import` makes of it."""
    folder = tmp_path / "vit"
    assert export.main([str(runs["vision"]), str(folder)]) == 0
    (folder / "d2v_scale.json").unlink()
    assert import_weights.main([str(folder), str(tmp_path / "imported")]) == 0
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), dtype=np.uint8)
    vectors = d2v_scale.load_encoder(runs["vision"]).embed(pixels)
    for path in (folder, tmp_path / "imported"):
        torch.testing.assert_close(d2v_scale.load_encoder(path).embed(pixels), vectors, rtol=1e-4, atol=1e-5)
