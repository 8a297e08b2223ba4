"""One rank: every small model under tensor parallelism, against what one process recorded.

Arguments: file of the recording, tensor-parallel size.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_models
import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2v_scale.data2vec import loss
from d2v_scale.data2vec.config import LossConfig
from d2v_scale.modalities import published_parts
from d2v_scale.model import attention_kernels, cpu_ops
from d2v_scale.model.init import full_shape_of, initial_tensor, initialize, tensor_parallel_slice
from d2v_scale.networks.draw import Draw
from d2v_scale.networks.stack import Student, Teacher
from d2v_scale.parallel import groups

CASES = [(name, padded) for name in tiny_models.NAMES for padded in (False, True)]
STEPS = 3


def jitter(student: Student) -> None:
    """Weights away from zero, the same whole tensors at any tensor-parallel size."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            noise = initial_tensor(f"jitter.{name}", full_shape_of(parameter), tiny_models.JITTER, seed=4)
            parameter.add_(tensor_parallel_slice(parameter, noise))


def run_case(name: str, padded: bool) -> dict[str, Tensor]:
    """A few SGD steps; losses, targets, predictions, first gradients and final weights by name."""
    config = tiny_models.model(name, drop_path=0.3)
    config.activation_checkpointing = padded
    student = Student(config)
    teacher = Teacher(config, tiny_models.target_of(name), published_parts(config))
    initialize(student, 1)
    initialize(teacher, 2)
    jitter(student)
    batch = tiny_models.batch(name, clones=1 if name == "v1_text" else 2, padded=padded)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    record: dict[str, Tensor] = {}
    for step in range(STEPS):
        out = student(batch, Draw(seed=5, step=step))
        targets_btd = teacher(batch, out.features_btd)
        targets_nd = targets_btd.repeat_interleave(batch.clones, dim=0).flatten(0, 1)[batch.layout.masked_n]
        value = loss.masked_loss_sum(out.predictions_nd, targets_nd, LossConfig(), 32) / targets_nd.shape[0]
        optimizer.zero_grad()
        value.backward()
        record[f"loss.{step}"] = value.detach()
        if step == 0:
            record["targets"], record["predictions"] = targets_btd, out.predictions_nd.detach()
            record.update(
                {f"gradient.{k}": p.grad.clone() for k, p in student.named_parameters() if p.grad is not None}
            )
        optimizer.step()
    record.update({f"weight.{k}": p.detach().clone() for k, p in student.named_parameters()})
    return record


def compare(
    case: str, ours: dict[str, Tensor], reference: dict[str, Tensor], parameters: dict[str, nn.Parameter]
) -> None:
    assert set(ours) == set(reference), case
    for key, tensor in ours.items():
        expected = reference[key]
        kind, _, name = key.partition(".")
        if kind in ("gradient", "weight"):
            expected = tensor_parallel_slice(parameters[name], expected)
        assert tensor.shape == expected.shape, (case, key)
        scale = max(1.0, float(expected.abs().max()))
        difference = float((tensor - expected).abs().max())
        assert difference < 2e-5 * scale, f"{case} {key}: {difference}"


def replicated_parameters_agree(case: str, ours: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    """Bitwise, after several steps: a replicated parameter that misses a gradient reduction drifts apart unseen."""
    for name, parameter in parameters.items():
        if getattr(parameter, "tensor_model_parallel", False):
            continue
        copies = everywhere(ours[f"weight.{name}"])
        assert all(torch.equal(copies[0], other) for other in copies), f"{case}: {name} differs between ranks"


def everywhere(tensor: Tensor) -> list[Tensor]:
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.contiguous())
    return copies


def dropout_differs_between_heads_and_hidden_units_only() -> None:
    """Outside them all ranks drop the same elements, inside each its own; the common generator stays in step."""
    student = Student(tiny_models.model("v1_speech", dropout=0.3, attention_dropout=0.5, activation_dropout=0.4))
    initialize(student, 1)
    heads: list[Tensor] = []
    hidden_units: list[Tensor] = []
    attend, dropout = attention_kernels.F.scaled_dot_product_attention, cpu_ops.dropout

    def watched_attend(*args, **kwargs) -> Tensor:
        heads.append(torch.rand(4))
        return attend(*args, **kwargs)

    def watched_dropout(x: Tensor, rate: float, training: bool) -> Tensor:
        out = dropout(x, rate, training)
        if rate == 0.4:
            hidden_units.append((out == 0).float())
        return out

    attention_kernels.F.scaled_dot_product_attention, cpu_ops.dropout = watched_attend, watched_dropout
    torch.manual_seed(7)
    out = student(tiny_models.batch("v1_speech"), Draw(0, 0))
    attention_kernels.F.scaled_dot_product_attention, cpu_ops.dropout = attend, dropout
    out.predictions_nd.sum().backward()
    state = torch.get_rng_state()
    assert all(torch.equal(state, other) for other in everywhere(state)), "the common generators are out of step"
    first = everywhere(out.predictions_nd.detach())
    assert all(torch.equal(first[0], other) for other in first), "replicated states differ between ranks"
    for what, seen in {"heads": heads, "hidden units": hidden_units}.items():
        draws = everywhere(torch.stack(seen))
        assert not torch.equal(draws[0], draws[1]), f"two ranks' {what} share a dropout pattern"
        assert not torch.equal(seen[0], seen[1]), f"the {what} of two blocks share a dropout pattern"


def main() -> None:
    recording, size = sys.argv[1], int(sys.argv[2])
    groups.initialize(groups.ParallelConfig(tensor=size))
    try:
        reference = torch.load(recording, weights_only=True)
        for name, padded in CASES:
            case = f"{name} padded={padded}"
            ours = run_case(name, padded)
            parameters = dict(Student(tiny_models.model(name)).named_parameters())
            compare(case, ours, reference[case], parameters)
            replicated_parameters_agree(case, ours, parameters)
        dropout_differs_between_heads_and_hidden_units_only()
        print("all cases agree", flush=True)
    finally:
        groups.shutdown()


if __name__ == "__main__":
    main()
