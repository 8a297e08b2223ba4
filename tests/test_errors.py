"""Our own errors between processes: each arrives as what it was."""

import ast
import importlib
import inspect
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_shards import image_samples

from d2v_scale import errors
from d2v_scale.data.config import DataConfig, SourceConfig
from d2v_scale.data.loader import StepLoader
from d2v_scale.data2vec.config import MaskingConfig
from d2v_scale.errors import ConfigError
from d2v_scale.model.config import ModelConfig
from d2v_scale.model.stem_config import VisionStem
from d2v_scale.shards.writing import write_set

PACKAGE = Path(errors.__file__).parent


def own_errors() -> Iterator[type[Exception]]:
    """Every class of the package that is an exception, wherever it is defined."""
    names = {"Exception", "RuntimeError", "ValueError", "OSError", "KeyError", "TypeError"}
    found: dict[str, Path] = {}
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    classes = [
        (path, node) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    for _ in range(4):  # parents before or after their children
        for path, node in classes:
            if any(ast.unparse(base).split(".")[-1] in names for base in node.bases):
                names.add(node.name)
                found[node.name] = path
    for name, path in sorted(found.items()):
        module = ".".join(("d2v_scale", *path.relative_to(PACKAGE).with_suffix("").parts))
        yield getattr(importlib.import_module(module), name)


def test_every_error_of_ours_is_the_same_after_pickling() -> None:
    """Those of two and more arguments could not be made again: a wrong key ended in a data worker with code 1."""
    kinds = list(own_errors())
    assert {"ConfigError", "DataStarved", "SampleFault", "FetchError"} <= {kind.__name__ for kind in kinds}
    for kind in kinds:
        wanted = [
            parameter
            for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        ]
        error = kind(*(f"the {parameter.name}" for parameter in wanted)) if wanted else kind("the reason")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error) != ""
        assert vars(again) == vars(error)
        assert getattr(again, "exit_code", None) == getattr(error, "exit_code", None)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_data_worker_arrives_as_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    write_set(tmp_path / "shards", "train", "image", image_samples(24), per_shard=12)
    model = ModelConfig(vision=VisionStem(image_size=8, patch_size=4))
    data = DataConfig(sources=[SourceConfig(shards=str(tmp_path / "shards/train.index.json"))], workers=workers)
    masks = MaskingConfig(kind="blockwise", target_count=4)
    with pytest.raises(ConfigError) as error:
        next(StepLoader(data, model, masks, seed=1, global_batch_size=8))
    assert error.value.key == "objective.masking.target_count"
    assert str(error.value).startswith("objective.masking.target_count: 4 of 4 patches cannot be masked.")
    assert not multiprocessing.active_children()
