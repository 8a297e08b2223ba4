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
from d2v_scale.model import block, learned_bias
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


def test_no_number_of_pieces_of_a_learned_bias_ends_the_compiling_of_blocks(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each number of pieces has graphs of its own, and equal pieces have no remainder."""
    student = Student(dataclasses.replace(tiny_models.model("v2_speech"), compile=True))
    initialize(student, 0)

    def step(number: int, samples: int) -> int:
        batch = tiny_models.batch("v2_speech", samples, 2, number % 2 == 1, number)
        output = student(batch, Draw(1, number))
        torch.stack([one.float().square().mean() for one in output.predictions]).sum().backward()
        bias = student.enter(batch)[0].attention_bias
        assert isinstance(bias, learned_bias.LearnedBias)
        return bias.pieces

    bias = student.enter(tiny_models.batch("v2_speech", 1, 2))[0].attention_bias
    assert isinstance(bias, learned_bias.LearnedBias)
    monkeypatch.setattr(learned_bias, "GRADIENT_BYTES", 2 * bias.added_rhss[0].nbytes)
    pieces = [step(number, samples) for number, samples in enumerate((1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 8, 8))]
    assert set(pieces) == {1, 2, 3, 4, 5, 8}
    known = len(graphs)
    assert known <= block.GRAPHS // 2
    for number, samples in enumerate((16, 16, 6, 6, 10, 10)):
        step(100 + number, samples)
    assert len(graphs) <= known + 3  # of 16, 6 and 10 pieces
    known = len(graphs)
    for number, samples in enumerate((8, 5, 4, 3, 16, 10, 2, 1)):
        step(200 + number, samples)
    assert len(graphs) == known
