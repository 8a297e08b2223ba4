"""Fixtures that any test may ask for. What tests share (`tiny_models`) is found through `pythonpath` in pyproject."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Whoever runs the tests under nohup has it ignored, and so would every program that a test starts and hangs up on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TESTS = Path(__file__).parent
OF_RANKS = ("slurm", "distributed", "planning")
"""Folders whose tests start several ranks: two at once would take turns at the cores, and take longer."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Among several processes (`pytest -n`) one begins with the tests that start ranks and has them all; else one has
    all tests of a file, or of a folder whose conftest makes what they share."""
    items.sort(key=lambda item: item.path.parent.name not in OF_RANKS)
    for item in items:
        folder = item.path.parent
        shared = folder if folder != TESTS and (folder / "conftest.py").is_file() else item.path
        group = "ranks" if folder.name in OF_RANKS else str(shared.relative_to(TESTS))
        item.add_marker(pytest.mark.xdist_group(group))


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
