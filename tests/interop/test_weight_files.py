"""Hugging Face folders as people have them: which files are read, which are named, which folders are refused."""

import json
import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported_models import checkpoint_of, tool
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2v_scale.errors import CheckpointError
from d2v_scale.interop.encoder_source import open_encoder
from d2v_scale.interop.importing import Imported, convert, open_source
from d2v_scale.interop.weight_files import PRECEDENCE, weights_file

warnings.filterwarnings("ignore")
NAMES = ("v1_speech", "v1_text", "v1_vision")
PREFIX = {"v1_speech": "data2vec_audio.", "v1_text": "data2vec_text.", "v1_vision": "data2vec_vision."}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An exported folder of every kind, as Hugging Face has them: without our note."""
    from d2v_scale.parallel import groups

    groups.single_process()
    folders = {}
    for name in NAMES:
        root = tmp_path_factory.mktemp(name)
        folders[name] = root / "hf"
        assert tool("export").main([str(checkpoint_of(name, root)), str(folders[name])]) == 0
        (folders[name] / "d2v_scale.json").unlink()
    return folders


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def save(values: dict[str, Tensor], file: Path) -> None:
    save_file(values, file, metadata={"format": "pt"})


def zeros(folder: Path) -> dict[str, Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in tensors(folder).items()}


def halves(folder: Path) -> list[dict[str, Tensor]]:
    values = tensors(folder)
    keys = list(values)
    return [{key: values[key] for key in part} for part in (keys[::2], keys[1::2])]


def shard(folder: Path, kind: str = "safetensors", variant: str = "") -> None:
    """In two files and an index, as save_pretrained of today or of old writes them."""
    stem = "model" if kind == "safetensors" else "pytorch_model"
    where = {}
    for i, part in enumerate(halves(folder), 1):
        name = f"{stem}{variant}-{i:05d}-of-00002.{kind}"
        save(part, folder / name) if kind == "safetensors" else torch.save(part, folder / name)
        where |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / f"{stem}.{kind}.index{variant}.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    shard(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def binary(folder: Path, **options: object) -> None:
    torch.save(tensors(folder), folder / "pytorch_model.bin", **options)  # type: ignore[arg-type]
    (folder / "model.safetensors").unlink()


def prefixed(prefix: str) -> Callable[[Path], None]:
    return lambda d: save({prefix + k: t for k, t in tensors(d).items()}, d / "model.safetensors")


def stale_shard(folder: Path) -> None:
    old = zeros(folder)
    shard(folder)
    save(old, folder / "model-00009-of-00009.safetensors")


def duplicate_in_a_shard(folder: Path) -> None:
    """The second shard also has the first one's tensors, of another training."""
    first, second = halves(folder)
    shard(folder)
    save(second | {k: torch.zeros_like(t) for k, t in first.items()}, folder / "model-00002-of-00002.safetensors")


def linked(folder: Path) -> None:
    """As the hub's cache has it."""
    (folder.parent / "blobs").mkdir()
    shutil.move(folder / "model.safetensors", folder.parent / "blobs" / "a1b2")
    os.symlink(folder.parent / "blobs" / "a1b2", folder / "model.safetensors")


def settings(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def named_by_config(folder: Path) -> None:
    stale = zeros(folder)
    shutil.move(folder / "model.safetensors", folder / "best.safetensors")
    save(stale, folder / "model.safetensors")
    settings(folder, transformers_weights="best.safetensors")


SAME: dict[str, tuple[Callable[[Path], object], str]] = {
    "a .bin": (binary, ""),
    "a .bin of old torch": (lambda d: binary(d, _use_new_zipfile_serialization=False), ""),
    "a .bin in shards": (lambda d: shard(d, "bin"), ""),
    "safetensors in shards": (shard, ""),
    "links of a cache": (linked, ""),
    "a stale shard": (stale_shard, "model-00009-of-00009.safetensors"),
    "a tensor in two shards": (duplicate_in_a_shard, "does not name them: tensors"),
    "a variant beside": (lambda d: save(zeros(d), d / "model.zzz.safetensors"), "model.zzz.safetensors"),
    "only a variant": (lambda d: (d / "model.safetensors").rename(d / "model.fp16.safetensors"), ""),
    "only a variant in shards": (lambda d: shard(d, variant=".fp16"), ""),
    "an adapter beside": (
        lambda d: save({"base_model.lora_A.weight": torch.zeros(2, 2)}, d / "adapter_model.safetensors"),
        "adapter_model.safetensors",
    ),
    "an optimizer beside": (lambda d: torch.save({"state": {}}, d / "optimizer.bin"), "optimizer.bin"),
    "training arguments beside": (lambda d: (d / "training_args.bin").write_bytes(b"cos\nsystem\n"), "training_args"),
    "a stale .bin beside": (lambda d: torch.save(zeros(d), d / "pytorch_model.bin"), "pytorch_model.bin"),
    "TensorFlow beside": (lambda d: (d / "tf_model.h5").write_bytes(b"x"), "tf_model.h5"),
    "a file that config.json names": (named_by_config, "model.safetensors"),
    "data parallelism's prefix": (prefixed("module."), ""),
    "a compiled model's prefix": (prefixed("module._orig_mod."), ""),
}


def imported(folder: Path) -> Imported:
    return convert(open_source(folder), "x")


@pytest.mark.parametrize("case", SAME)
def test_what_the_index_decides_is_read_and_the_rest_is_named(
    case: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    change, said = SAME[case]
    for name in NAMES:
        folder = tmp_path / name / "hf"
        shutil.copytree(exports[name], folder)
        change(folder)
        got, wanted = imported(folder), imported(exports[name])
        for key, tensor in wanted.student.items():
            assert key.startswith("predictors.") or torch.equal(got.student[key], tensor), f"{name} {key}"
        assert said in "\n".join(got.lines)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_a_task_model_in_half_precision_are_read(
    name: str, exports: dict[str, Path], tmp_path: Path
) -> None:
    wanted = imported(exports[name])
    for dtype, closeness in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        folder = tmp_path / str(dtype) / "hf"
        shutil.copytree(exports[name], folder)
        values = {PREFIX[name] + k: t.to(dtype) for k, t in tensors(folder).items()}
        save(values | {"classifier.weight": torch.ones(3, 32)}, folder / "model.safetensors")
        got = imported(folder)
        for key, tensor in wanted.student.items():
            assert key.startswith("predictors.") or torch.allclose(
                got.student[key].float(), tensor, atol=closeness, rtol=closeness
            )


def test_transformers_looks_in_the_same_order(exports: dict[str, Path], tmp_path: Path) -> None:
    """Of all four forms the same file wins, one after the other; each holds other numbers."""
    from transformers import AutoModel

    folder = tmp_path / "hf"
    shutil.copytree(exports["v1_text"], folder)
    key = "embeddings.LayerNorm.weight"
    plain = tensors(folder)
    torch.save({k: t + 2 for k, t in plain.items()}, folder / "pytorch_model.bin")
    for i, (kind, index) in enumerate((("safetensors", PRECEDENCE[1]), ("bin", PRECEDENCE[3]))):
        values, shard_name = {k: t + 1 + 2 * i for k, t in plain.items()}, f"s-00001-of-00001.{kind}"
        save(values, folder / shard_name) if kind == "safetensors" else torch.save(values, folder / shard_name)
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(plain, shard_name)}))
    for added, name in enumerate(PRECEDENCE):
        assert weights_file(folder) == name
        theirs = AutoModel.from_pretrained(folder).state_dict()[key]
        assert torch.allclose(theirs, plain[key] + added)
        source = open_source(folder)
        assert torch.equal(source.student[key], theirs)
        (folder / name).unlink()


def test_buffers_that_old_transformers_saved_are_ignored(exports: dict[str, Path], tmp_path: Path) -> None:
    relative = "relative_position_bias.relative_position_index"
    buffers = {
        "v1_text": ["embeddings.position_ids", "embeddings.token_type_ids"],
        "v1_vision": [
            f"encoder.{relative}",
            *[f"encoder.layer.{i}.attention.attention.{relative}" for i in range(3)],
        ],
    }
    for name, keys in buffers.items():
        folder = tmp_path / name
        shutil.copytree(exports[name], folder)
        values = {PREFIX[name] + k: t for k, t in tensors(folder).items()}
        save(values | {PREFIX[name] + k: torch.arange(30)[None] for k in keys}, folder / "model.safetensors")
        assert f"ignored {len(keys)}" in "\n".join(imported(folder).lines)


def test_a_tied_embedding_is_read_under_its_other_name(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exports["v1_text"], folder)
    values = tensors(folder)
    embedding = values.pop("embeddings.word_embeddings.weight")
    values = {f"data2vec_text.{k}": t for k, t in values.items()}
    save(values | {"lm_head.decoder.weight": embedding, "lm_head.bias": torch.zeros(40)}, folder / "model.safetensors")
    assert torch.equal(imported(folder).student["stems.text.features.tokens.weight"], embedding)


def test_a_classifier_that_averages_patches_has_no_final_norm(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exports["v1_vision"], folder)
    values = {k: t for k, t in tensors(folder).items() if not k.startswith("layernorm.")}
    save(values, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: layernorm\.weight"):
        imported(folder)
    settings(folder, use_mean_pooling=True)
    assert "initialised anew" in "\n".join(imported(folder).lines)


class Harmful:
    """Unpickling this would make a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def only(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / name)

    return change


def outside(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save(tensors(folder), folder.parent / "other.safetensors")
        rewrite_index(folder, lambda where: where.update({next(iter(where)): name}))

    return change


def shard_without(folder: Path) -> None:
    shard(folder)
    file = folder / "model-00002-of-00002.safetensors"
    save(dict(list(load_file(file).items())[1:]), file)


def spoiled(value: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = tensors(folder)
        key = next(key for key in values if key.endswith("output.dense.weight"))
        save(values | {key: value(values[key])}, folder / "model.safetensors")

    return change


def harmful_shard(folder: Path) -> None:
    shard(folder, "bin")
    torch.save({"a": Harmful(folder / "it ran")}, folder / "pytorch_model-00001-of-00002.bin")


def harmful_legacy(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Harmful(folder / "it ran")}))
    (folder / "model.safetensors").unlink()


def two_variants(folder: Path) -> None:
    save(zeros(folder), folder / "model.a.safetensors")
    only("model.b.safetensors")(folder)


def index_of(content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shard(folder)
        (folder / "model.safetensors.index.json").write_text(content)

    return change


def twice(folder: Path) -> None:
    values = tensors(folder)
    save(values | {f"data2vec_text.{k}": t + 1 for k, t in values.items()}, folder / "model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing shard": (
        lambda d: (shard(d), (d / "model-00002-of-00002.safetensors").unlink()),
        "names model-00002-of-00002.safetensors, which is not there",
    ),
    "a shard that lacks a tensor": (shard_without, "model-00002-of-00002.safetensors lacks"),
    "a path out of the folder": (outside("../other.safetensors"), "no file of its folder"),
    "an absolute path": (outside("/tmp/other.safetensors"), "no file of its folder"),
    "a path of Windows": (outside("..\\other.safetensors"), "no file of its folder"),
    "a name that is none": (lambda d: rewrite_index(d, lambda w: w.update(dict.fromkeys(w, 3))), "no file of its"),  # type: ignore[arg-type]
    "an index that is no JSON": (index_of("{"), "is not JSON"),
    "an index that is a list": (index_of("[]"), "not an object"),
    "an index without a map": (index_of('{"metadata": {}}'), "has no weight_map"),
    "an empty index": (index_of('{"weight_map": {}}'), "has no weight_map"),
    "two variants": (two_variants, "several variants"),
    "only an adapter": (only("adapter_model.safetensors"), "merge_and_unload"),
    "only TensorFlow": (only("tf_model.h5"), "TensorFlow or Flax"),
    "only Flax": (only("flax_model.msgpack"), "TensorFlow or Flax"),
    "only an optimizer": (only("optimizer.bin"), "only optimizer.bin"),
    "another name": (only("weights.safetensors"), "only weights.safetensors"),
    "shards without an index": (
        lambda d: (shard(d), (d / "model.safetensors.index.json").unlink()),
        "which tensor is in which shard",
    ),
    "nothing": (lambda d: (d / "model.safetensors").unlink(), "holds no model.safetensors"),
    "a pointer of Git LFS": (
        lambda d: (d / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "a pickle that would run": (harmful_shard, "wants to import"),
    "an old pickle that would run": (harmful_legacy, "cannot be loaded"),
    "a training checkpoint called .bin": (
        lambda d: (torch.save({"model": tensors(d), "step": 3}, d / "pytorch_model.bin"), only("other.bak")(d)),
        "more than tensors",
    ),
    "two of one name": (twice, "two tensors are the encoder's"),
    "8 bits": (spoiled(lambda t: t.to(torch.int8)), "int8"),
    "a NaN": (spoiled(lambda t: t * torch.nan), "not finite"),
    "another activation": (lambda d: settings(d, hidden_act="relu"), "hidden_act='relu'"),
    "relative positions in a text": (lambda d: settings(d, position_embedding_type="relative_key"), "relative_key"),
    "a decoder": (lambda d: settings(d, is_decoder=True), "is_decoder=True"),
    "quantised": (lambda d: settings(d, quantization_config={"quant_method": "gptq"}), "quantised"),
    "a settings file that is a list": (lambda d: (d / "config.json").write_text("[]"), "not an object"),
    "weights named in config.json that are elsewhere": (
        lambda d: settings(d, transformers_weights="../model.safetensors"),
        "no file of its folder",
    ),
    "old weight normalisation": (
        lambda d: save(
            {k.replace("dense.weight", "dense.weight_g"): t for k, t in tensors(d).items()}, d / "model.safetensors"
        ),
        "unexpected: encoder.layer.0.attention.output.dense.weight_g",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_cannot_be_trusted_is_refused_in_a_sentence(
    case: str, exports: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = REFUSED[case]
    folder = tmp_path / "hf"
    shutil.copytree(exports["v1_text"], folder)
    change(folder)
    assert tool("import_weights").main([str(folder), str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (folder / "it ran").exists()
    with pytest.raises(CheckpointError):
        open_encoder(folder)


def test_one_file_of_a_folder_is_sent_to_the_folder(exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Give the folder"):
        open_source(exports["v1_text"] / "model.safetensors")
    (tmp_path / "checkpoint_best.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"such as .*checkpoint_best\.pt"):
        open_source(tmp_path)


def test_an_encoder_opened_in_place_names_what_it_did_not_read(
    exports: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(exports["v1_speech"], folder)
    save(zeros(folder), folder / "model.fp16.safetensors")
    with caplog.at_level(logging.WARNING):
        open_encoder(folder)
    assert caplog.text.count("not read: model.fp16.safetensors") == 1
