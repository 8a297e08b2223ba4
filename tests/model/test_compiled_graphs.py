"""However batches of a run are shaped, blocks stay compiled."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from d2v_scale import modalities
from d2v_scale.batch import Batch
from d2v_scale.model import block
from d2v_scale.model.init import initialize
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher

pytestmark = pytest.mark.usefixtures("world_of_one")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Those that blocks take, run as they are instead of being made into kernels."""
    import torch._dynamo as dynamo

    taken: list[Any] = []

    def run_as_it_is(graph: nn.Module, _: list[Tensor]) -> Callable[..., Any]:
        taken.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=run_as_it_is))
    dynamo.reset()
    with dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        yield taken
    dynamo.reset()


def text_batch(name: str, samples: int, length: int, padded: bool, seed: int) -> Batch:
    """Random tokens of which a third is masked; with `padded` some rows are shorter."""
    generator = torch.Generator().manual_seed(seed)
    tokens_bt = torch.randint(4, 39, (samples, length), generator=generator)
    lengths_b = torch.tensor([length - (i % 4) * length // 8 for i in range(samples)])
    valid_bt = torch.arange(length)[None] < lengths_b[:, None]
    masked_bt = torch.zeros(samples, length, dtype=torch.bool)
    for row in range(samples):
        count = max(1, length // 3) + (row % 2 if name == "v1_text" else 0)
        masked_bt[row, torch.randperm(length // 2 + 1, generator=generator)[:count]] = True
    return Batch(
        modality="text",
        inputs=torch.where(valid_bt, tokens_bt, 1) if padded else tokens_bt,
        valid=valid_bt if padded else None,
        masked_rt=masked_bt,
        student_inputs=torch.where(masked_bt, 39, tokens_bt) if name == "v1_text" else None,
        sample_ids=torch.arange(samples),
    )


@pytest.mark.parametrize("name", ["v1_text", "v2_text"])
def test_no_shape_of_a_batch_ends_the_compiling_of_blocks(name: str, graphs: list[Any]) -> None:
    """1.0 text has 18 graphs: PyTorch's limit of 8 was passed after four batches, and further shapes ran uncompiled."""
    model = dataclasses.replace(tiny_models.model(name, drop_path=0.2, depth=2), compile=True)
    student = Student(model)
    initialize(student, 0)
    student.train()
    teacher = Teacher(model, tiny_models.target_of(name), modalities.published_parts(model))
    for parameter in teacher.parameters():
        parameter.data.normal_(0, 0.02)

    def step(number: int, samples: int, length: int, padded: bool) -> None:
        batch = text_batch(name, samples, length, padded, number)
        output = student(batch, Draw(1, number))
        torch.stack([one.float().square().mean() for one in output.predictions]).sum().backward()
        teacher.make(batch, output.features_btd.detach())

    kinds = [(samples, length, padded) for length in (12, 16, 17) for samples in (2, 1, 8) for padded in (False, True)]
    for number, kind in enumerate(kinds):
        step(number, *kind)
    assert 0 < len(graphs) <= block.GRAPHS // 2
    known = len(graphs)
    # What comes after is of graphs that there are.
    for number, (samples, length, padded) in enumerate([(3, 20, True), (16, 24, False), (5, 9, True), (7, 13, True)]):
        step(100 + number, samples, length, padded)
    assert len(graphs) == known
