import torch

from d2v_scale.finetuning.config import ImageConfig
from d2v_scale.finetuning.mixing import erase, mix, soft_targets


def test_soft_targets_are_smoothed_and_a_row_without_label_has_none() -> None:
    targets_bc = soft_targets(torch.tensor([2, -1]), 4, 0.1)
    assert torch.allclose(targets_bc, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.0, 0.0, 0.0, 0.0]]))


def test_targets_are_mixed_in_the_proportion_of_the_pixels() -> None:
    # Image b is filled with its class's number, so the mean of a mixed image tells what it is made of.
    labels = torch.arange(4)
    images = labels.float()[:, None, None, None].expand(4, 3, 16, 16)
    targets = soft_targets(labels, 4, 0.0)
    seen = set()
    for step in range(40):
        config = ImageConfig(mixup=0.8, cutmix=1.0, mix_probability=0.75)
        mixed, soft = mix(images, targets, config, 1, step)
        assert torch.allclose(soft.sum(dim=1), torch.ones(4))
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), soft @ labels.float(), atol=1e-5)
        pasted = mixed.flatten(1).std(dim=1).max() > 1e-3
        seen.add("cutmix" if pasted else "nothing" if torch.equal(mixed, images) else "mixup")
        again, _ = mix(images, targets, config, 1, step)
        assert torch.equal(mixed, again)
    assert seen == {"cutmix", "mixup", "nothing"}


def test_erasing_replaces_one_rectangle_of_some_images() -> None:
    images = torch.zeros(200, 1, 20, 20)
    erased = erase(images, 0.25, torch.arange(200), 0, 0)[:, 0] != 0
    touched = erased.flatten(1).any(dim=1)
    assert 25 < int(touched.sum()) < 75
    for mask in erased[touched]:
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert int(mask.sum()) == int(rows * columns), "a full rectangle"
        assert 0.01 * 400 < int(mask.sum()) < 0.5 * 400
    assert torch.equal(erase(images, 0.0, torch.arange(200), 0, 0), images)
