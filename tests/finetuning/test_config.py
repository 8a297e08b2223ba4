import pytest
import tiny_models

from d2v_scale.errors import ConfigError
from d2v_scale.finetuning.config import CtcConfig, TaskConfig


@pytest.mark.parametrize(
    ("task", "name", "ranks", "key"),
    [
        (TaskConfig(kind="ctc"), "v1_vision", 1, "task.kind"),
        (TaskConfig(classes=1), "v1_vision", 1, "task.classes"),
        (TaskConfig(layer_decay=0.0), "v1_vision", 1, "task.layer_decay"),
        (TaskConfig(metrics=["wer"]), "v1_vision", 1, "task.metrics"),
        (TaskConfig(kind="ctc", ctc=CtcConfig(letters="aba")), "v1_speech", 1, "task.ctc.letters"),
        (TaskConfig(kind="ctc", ctc=CtcConfig(channel_mask_length=64)), "v1_speech", 1, "task.ctc.channel_mask_length"),
        (TaskConfig(), "v1_vision", 2, "parallel"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(task: TaskConfig, name: str, ranks: int, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task.check(tiny_models.model(name), ranks)
    assert caught.value.key == key


def test_masks_of_a_task_that_hides_nothing_are_empty() -> None:
    from d2v_scale.data2vec.masking import collate

    masks = collate(TaskConfig().masking(), length=30, sample_ids=[1, 2], seed=0, step=0)
    assert not masks.masked_rt.any()
    hidden = collate(TaskConfig(kind="ctc").masking(), length=200, sample_ids=[1, 2], seed=0, step=0)
    assert 0.3 < hidden.masked_rt.mean() < 0.65
