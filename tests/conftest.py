"""Fixtures that any test may ask for. What tests share (`tiny_models`) is found through `pythonpath` in pyproject."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

# Whoever runs the tests under nohup has it ignored, and so would every program that a test starts and hangs up on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Runs are compared with each other, bit by bit: none may measure what is faster (`d2v_scale/running/arithmetic.py`).
os.environ["D2V_SCALE_MEASURE"] = "0"

TESTS = Path(__file__).parent
GROUPS = {"distributed": "ranks", "planning": "ranks", "slurm": "slurm"}
"""Folders whose tests are done by one process, and first: those that start several ranks would take turns at the cores,
and Slurm's wait most of their time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of `GROUPS` come first, in that order, then the README's, of which one takes minutes."""
    order = [*GROUPS, "tests"]

    def place(item: pytest.Item) -> int:
        folder = item.path.parent.name
        early = folder in GROUPS or item.path.name == "test_readme.py"
        return order.index(folder) if early else len(order)

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadScopeScheduling":
    """Among several processes (`pytest -n`) one has all tests of a group, or of a folder whose conftest makes what they
    share, or of a file. By path: xdist's own groups are without effect from pytest 9.2 on.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByPath(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = config.rootpath / nodeid.partition("::")[0]
            folder = path.parent
            shared = folder if folder != TESTS and (folder / "conftest.py").is_file() else path
            return GROUPS.get(folder.name, str(shared))

    return ByPath(config, log)


@pytest.fixture(autouse=True)
def _what_is_logged_stays() -> Iterator[None]:
    """Programs that run within a test quieten their process's log for good."""
    root = logging.getLogger()
    named = (log for name, log in root.manager.loggerDict.items() if name.startswith("d2v_scale"))
    ours = [log for log in named if isinstance(log, logging.Logger)]
    disabled, levels = root.manager.disable, {log: log.level for log in (root, *ours)}
    yield
    logging.disable(disabled)
    for log, level in levels.items():
        log.setLevel(level)


@pytest.fixture
def world_of_one() -> None:
    """Process groups of a single process, which models need to be built."""
    from d2v_scale.parallel import groups

    groups.single_process()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of 20 images, the last of 10."""
    from small_shards import image_samples

    from d2v_scale.shards.writing import write_set

    out = tmp_path_factory.mktemp("images")
    write_set(out, "train", "image", image_samples(90), per_shard=20, classes=["a", "b", "c"])
    return out


@pytest.fixture(scope="session")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of recordings."""
    from small_shards import sound_samples

    from d2v_scale.modalities.speech import decoder as speech
    from d2v_scale.shards.writing import write_set

    out = tmp_path_factory.mktemp("sounds")
    write_set(out, "train", "recording", sound_samples(75), per_shard=20, measure=speech.measure)
    return out


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of documents and their tokenizer."""
    from small_shards import documents

    from d2v_scale.modalities.text.decoder import TokenCounter
    from d2v_scale.modalities.text.tokenizer_training import train
    from d2v_scale.shards.writing import Sample, write_set

    out = tmp_path_factory.mktemp("texts")
    tokenizer = out / "tokenizer.model"
    train(documents(200), tokenizer, vocab_size=330)
    samples: list[Sample] = [{"__key__": f"document-{k:04d}", "txt": text} for k, text in enumerate(documents(110))]
    write_set(out, "train", "text", samples, per_shard=40, measure=TokenCounter(tokenizer), tokenizer=tokenizer)
    return out
