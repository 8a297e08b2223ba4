"""Muon for the matrices of blocks and decoders, AdamW for everything else, in one optimizer.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) steps along the nearest orthogonal matrix of the gradient's
momentum. Its rate is Moonlight's (Liu et al. 2025, arXiv 2502.16982): the orthogonal matrix times .2 sqrt(max(rows,
columns)) has the root mean square of an update of AdamW, so that both take one learning rate and one weight decay.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration: singular values end between .7 and 1.2."""
_ADAMW_STEP = inspect.unwrap(torch.optim.AdamW.step)
"""Without the hooks, which the whole step has called."""


def orthogonalized(x_bmn: Tensor, iterations: int) -> Tensor:
    """U V^T of each matrix of a batch, roughly, where U S V^T is its singular value decomposition; zeros stay zeros.

    In the type of `x_bmn`: bf16 is enough for training, fp32 for comparisons.
    """
    a, b, c = COEFFICIENTS
    tall = x_bmn.shape[-2] > x_bmn.shape[-1]
    x = x_bmn.mT if tall else x_bmn
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def as_matrices(x: Tensor, structure: tuple[int, int]) -> Tensor:
    """The matrices that a parameter holds, (B, M, N); see `structure_of`. A copy where rows lie apart."""
    outer, inner = structure
    rows = x.reshape(outer, inner, x.shape[0] // (outer * inner), -1)
    return rows.transpose(0, 1).reshape(inner, -1, rows.shape[-1])


def from_matrices(x_bmn: Tensor, structure: tuple[int, int], shape: torch.Size) -> Tensor:
    """The inverse of `as_matrices`."""
    outer, inner = structure
    return x_bmn.reshape(inner, outer, -1, x_bmn.shape[-1]).transpose(0, 1).reshape(shape)


def structure_of(parameter: Tensor) -> tuple[int, int]:
    """How the rows of a parameter are ordered, [outer][inner][row]: `inner` matrices, each of `outer` runs of rows.

    (heads, 3) of queries, keys and values in one, (1, groups) of a grouped convolution; (1, 1) is one matrix, as is
    whatever no module has given a structure.
    """
    return getattr(parameter, "matrices", (1, 1))


def give_structure(layer: nn.Module, structure: tuple[int, int]) -> None:
    """Note with the weight of a layer what `structure_of` says of it."""
    layer.weight.matrices = structure  # type: ignore[union-attr]


def direction(momentum: Tensor, structure: tuple[int, int], iterations: int, dtype: torch.dtype) -> Tensor:
    """What a whole parameter is moved along, times the learning rate: fp32, in the parameter's shape."""
    x_bmn = as_matrices(momentum, structure)
    scale = 0.2 * math.sqrt(max(x_bmn.shape[1:]))
    return scale * from_matrices(orthogonalized(x_bmn.to(dtype), iterations).float(), structure, momentum.shape)


class MatrixOptimizer(torch.optim.AdamW):
    """Muon in groups with the key `is_matrix`, torch's fused AdamW in the others.

    Muon's momentum is the state `exp_avg`; there is no other. `directions` takes a parameter and its momentum to what
    the parameter is moved along; where parameters are flat pieces of many, `parallel.whole_matrices` sets it.
    """

    def __init__(self, groups: list[dict[str, Any]], *, momentum: float, iterations: int, **adamw: Any) -> None:
        super().__init__(groups, fused=True, **adamw)
        self.momentum, self.iterations = momentum, iterations
        self.directions: Callable[[Tensor, Tensor], Tensor] = self._of_whole

    def _of_whole(self, parameter: Tensor, momentum: Tensor) -> Tensor:
        return direction(momentum, structure_of(parameter), self.iterations, parameter.dtype)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Collective where `directions` is."""
        assert closure is None, "the gradients are there"
        groups = self.param_groups
        for group in groups:
            if group["is_matrix"]:
                self._step_matrices(group)
        self.param_groups = [group for group in groups if not group["is_matrix"]]
        _ADAMW_STEP(self)
        self.param_groups = groups

    def _step_matrices(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
            state["step"] += 1
            state["exp_avg"].lerp_(gradient, 1 - self.momentum)
            ahead = gradient.lerp(state["exp_avg"], self.momentum)  # Nesterov's
            moved = self.directions(parameter, ahead)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(moved, alpha=-group["lr"])
